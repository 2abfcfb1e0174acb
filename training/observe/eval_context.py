"""What evaluation and sample sheets look at while a stage trains, and whom they tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from pipeline.core.manifest import VaeFacts
from training.model import DiffusionModel
from training.observe.meter import Meter
from training.observe.metrics import Metrics

Say = Callable[[int, str], None]
"""Shows a line to the user: (step, text)."""


@dataclass(frozen=True)
class EvalContext:
    """A stage's model, and what belongs to it."""

    model: DiffusionModel
    averages: Callable[[], Mapping[str, Mapping[str, Tensor]]]
    """The averages that there are by now: name -> tensors by parameter name."""
    steps: int
    """Of the stage; its last one is always looked at."""
    batch_size: int
    """Samples computed at once."""
    vae: VaeFacts
    """Of the VAE that made the latents."""
    trimmed: bool
    """Whether captions are."""
    meter: Meter
    metrics: Metrics
    say: Say

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.steps

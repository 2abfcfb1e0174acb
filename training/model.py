"""The network and its loss, in the shape that Composer trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from composer.models import ComposerModel
from torch import Tensor

from training.flops import flops_per_image
from training.masking.ratio import RatioSchedule, ratio_at
from training.masking.scheme import Scheme
from training.network.dit import MicroDiT
from training.objectives.denoiser import Denoiser
from training.randomness import Draws, Rows, draw

STEP_PASSES = 3  # forward FLOPs in a training step: forward, and twice that backward


@dataclass(frozen=True)
class Objective:
    """What a stage asks of the network, and the key of its random numbers."""

    denoiser: Denoiser
    mask: Scheme
    mask_ratio: float | RatioSchedule
    caption_drop: float
    seed: int
    stage: str  # its `stage_key`
    batch_size: int  # over all ranks
    rows: Rows  # of this rank


class DiffusionModel(ComposerModel):
    """Training loss of a MicroDiT on a batch of `training.data.loader.collate`.

    `step` has to be set before each batch: noise, noise levels and masks are a function of it.
    Whether a caption is dropped is a function of sample and epoch. Batches are never written to.
    """

    def __init__(self, dit: MicroDiT, objective: Objective) -> None:
        super().__init__()
        self.dit = dit
        self.objective = objective
        self.step = 0
        self._draws: tuple[int, Draws] | None = None

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Loss of each sample of a micro-batch, float32 (B,)."""
        objective, index, latents = self.objective, batch["index"], self._latents(batch)
        draws = self._draw(latents.device)
        y, y_mask = drop_captions(
            batch["y"], batch.get("y_mask"), batch["drop"] < objective.caption_drop
        )
        return objective.denoiser.loss(
            self.dit,
            latents,
            objective.denoiser.level(draws.level[index]),
            draws.noise[index],
            y,
            y_mask,
            objective.mask.draw(draws.mask[index], self._ratio()),
            objective.mask.extra_loss(),
        )

    @torch.no_grad()
    def heldout_loss(self, batch: dict[str, Tensor], normal: Tensor, noise: Tensor) -> Tensor:
        """Loss of each sample, float32 (B,), at given unit normal numbers: those in `normal` (B,)
        decide its level. No patch is masked and no caption dropped."""
        denoiser, level = self.objective.denoiser, self.objective.denoiser.level(normal)
        y, y_mask = batch["y"], batch.get("y_mask")
        return denoiser.loss(self.dit, self._latents(batch), level, noise, y, y_mask)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean over the micro-batch."""
        return outputs.mean()

    def get_metrics(self, is_train: bool) -> dict:
        """None: with any, Composer would flip eval() and train() around every micro-batch."""
        return {}

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """FLOPs of forward and backward of this rank's batch, as Composer's SpeedMonitor asks."""
        forward = flops_per_image(
            self.dit.config, self._ratio(), batch["y"].shape[1], self.objective.mask
        )
        return STEP_PASSES * forward * len(batch["latents"])

    def _latents(self, batch: dict[str, Tensor]) -> Tensor:
        # All is computed in their precision, or in float32 where that is higher.
        double = self.dit.pos_embed.dtype == torch.float64
        return batch["latents"].double() if double else batch["latents"]

    def _ratio(self) -> float:
        return ratio_at(self.objective.mask_ratio, self.step)

    def _draw(self, device: torch.device) -> Draws:
        """The step's numbers, drawn once for all its micro-batches."""
        if self._draws is None or self._draws[0] != self.step:
            objective, config = self.objective, self.dit.config
            draws = draw(
                (objective.seed, objective.stage, self.step),
                objective.batch_size,
                (config.in_channels, config.input_size, config.input_size),
                config.tokens,
                objective.rows,
                device,
            )
            self._draws = (self.step, draws)
        return self._draws[1]


def drop_captions(y: Tensor, y_mask: Tensor | None, drop: Tensor) -> tuple[Tensor, Tensor | None]:
    """Captions y (B, L, W) and their mask with those of `drop`, bool (B,), made empty.

    An empty caption is what the sampler calls unconditional: all rows zero, of which a trimmed
    batch attends to the first alone.
    """
    y = torch.where(drop[:, None, None], 0, y)
    if y_mask is not None:
        first = torch.arange(y_mask.shape[1], device=y.device) == 0
        y_mask = torch.where(drop[:, None], first, y_mask)
    return y, y_mask

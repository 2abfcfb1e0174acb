"""What a stage has done so far and what that took: counters, which every report reads.

Nothing here reads from the device: losses come from Composer, which reads them anyway, and FLOPs
are a closed form of shapes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields

from composer import Callback, Logger, State

from training.model import DiffusionModel

STALL = 0.1  # of a step's time


@dataclass(frozen=True)
class Totals:
    """Sums over steps; the difference of two is a window."""

    steps: int = 0
    samples: int = 0  # over all ranks
    flops: float = 0.0  # of this rank, forward and backward
    seconds: float = 0.0  # of training: without evaluation, painting and saving
    waited: float = 0.0  # seconds of these in which the trainer had no batch
    stalls: int = 0  # steps that waited for more than a tenth of their time, after the first
    losses: int = 0  # steps whose loss is a number
    loss: float = 0.0  # their sum

    def __sub__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def mean_loss(self) -> float:
        """NaN where no loss was a number."""
        return self.loss / self.losses if self.losses else math.nan

    def rates(self, peak_flops: float | None) -> dict[str, float]:
        """Samples a second of all ranks, FLOP/s of this one, waiting as a share.

        Args:
            peak_flops: of one device, FLOP/s; None where it is not known: no utilisation then.
        """
        seconds = max(self.seconds, 1e-9)
        rates = {
            "samples_per_second": self.samples / seconds,
            "tflops_per_device": self.flops / seconds / 1e12,
            "data_wait_share": self.waited / seconds,
        }
        if peak_flops is not None:
            rates["mfu"] = self.flops / seconds / peak_flops
        return rates


class Meter(Callback):
    """Counts. Comes before all callbacks that read `totals`.

    Args:
        model: whose `flops_per_batch` says what a batch takes.
    """

    def __init__(self, model: DiffusionModel) -> None:
        self.totals = Totals()
        self._model = model
        self._paused = 0.0
        self._waiting_since: float | None = None
        self._waited = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in this block is no training: its time does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def fit_start(self, state: State, logger: Logger) -> None:
        self._began = self._now()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        # At an epoch's end the loader has no batch, and this comes again when the next one begins:
        # all of what is in between is waiting.
        if self._waiting_since is None:
            self._waiting_since = self._now()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if self._waiting_since is not None:
            self._waited += self._now() - self._waiting_since
            self._waiting_since = None

    def batch_end(self, state: State, logger: Logger) -> None:
        before, loss = self.totals, state.total_loss_dict["loss/train/total"]
        seconds = self._now() - self._began
        waited = self._waited - before.waited > STALL * (seconds - before.seconds)
        samples = state.timestamp.sample.value - state.previous_timestamp.sample.value  # pyright: ignore
        self.totals = Totals(
            steps=before.steps + 1,
            samples=before.samples + samples,
            flops=before.flops + self._model.flops_per_batch(state.batch),
            seconds=seconds,
            waited=self._waited,
            stalls=before.stalls + (before.steps > 0 and waited),
            losses=before.losses + math.isfinite(loss),
            loss=before.loss + (loss if math.isfinite(loss) else 0.0),
        )

    def _now(self) -> float:
        return time.perf_counter() - self._paused


class DeviceHours:
    """Seconds that this run has held its devices, over all its starts.

    Args:
        devices: of this start, in use from now on.
    """

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self._carried = 0.0
        self._began = time.monotonic()

    def device_seconds(self) -> float:
        return self._carried + self._devices * (time.monotonic() - self._began)

    def raise_to(self, device_seconds: float) -> None:
        """What an earlier start has left on record."""
        self._carried += max(0.0, device_seconds - self.device_seconds())

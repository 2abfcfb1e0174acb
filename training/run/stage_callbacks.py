"""What happens around each step: its number and learning rate before, checkpoints after it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint

from pipeline.core.errors import SettingError
from training.checkpoint.checkpoints import template
from training.checkpoint.run_folder import StageFolder
from training.config.stage_settings import StageSettings
from training.model import DiffusionModel
from training.observe.meter import Meter
from training.observe.metrics import Metrics
from training.optim.guard import Guard, RollBack
from training.optim.optimizers import learning_rate
from training.run.stopping import StopAtSignal


class StepFunctions(Callback):
    """Sets what is a function of the step: the model's random numbers and the learning rate."""

    def __init__(self, model: DiffusionModel, stage: StageSettings) -> None:
        self._model = model
        self._stage = stage

    def batch_start(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        self._model.step = step
        rate = learning_rate(self._stage, step)
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate * group["lr_factor"]


class StayAlone(Callback):
    """Ends the run where another training took its folder over.

    Args:
        taken: says who did; "" as long as nobody has.
    """

    def __init__(self, taken: Callable[[], str]) -> None:
        self._taken = taken

    def batch_end(self, state: State, logger: Logger) -> None:
        """Before a checkpoint of this step would be written among the other's."""
        if who := self._taken():
            raise SettingError(f"{who}, which took this run for dead; this one ends")


class SaveCheckpoints(Callback):
    """A checkpoint every N steps and at the end: whole under its final name, or not there.

    None after a bad step, except at the end: the guard, or the next start, goes back to before the
    trouble.
    Composer's saver writes to the final name in place; a start after a kill in the middle of that
    stops at the file it finds.

    Args:
        begun: fingerprint of what the stage was begun with; each checkpoint says it.
        keep: how many stay.
        stop: says whether the run ends after this step.
        copy: called with each checkpoint that is whole, on the first rank.
        say: shows a line (step, text) to the user.
    """

    def __init__(
        self,
        folder: StageFolder,
        stage: StageSettings,
        begun: str,
        keep: int,
        guard: Guard,
        meter: Meter,
        metrics: Metrics,
        stop: StopAtSignal,
        copy: Callable[[Path], None],
        say: Callable[[int, str], None],
    ) -> None:
        self._folder = folder
        self._guard = guard
        self._meter = meter
        self._metrics = metrics
        self._stage = stage
        self._begun = begun
        self._keep = keep
        self._stop = stop
        self._copy = copy
        self._say = say
        self._took = 0.0  # seconds, of the last one

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            for name in self._folder.remove_parts():
                self._say(
                    state.timestamp.batch.value,
                    f"an earlier start was killed while it wrote {name.split('.')[0]}.pt; if that "
                    "was after SIGTERM, it needs more time (docs/train.md)",
                )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        due = step % self._stage.save_every == 0 or self._stop.now
        if step != self._stage.steps and (self._guard.in_a_row or not due):
            return
        with self._meter.paused():
            try:
                self._guard.require_finite(state)
            except RollBack:
                if self._stop.now:
                    return  # the next start goes on from before the trouble
                raise
            if self._stop.now:
                before = f" (the last one took {self._took:.0f} s)" if self._took else ""
                self._say(step, f"SIGTERM: saving a checkpoint{before}")
            self._metrics.write()  # a resumed run writes the lines after this step only
            self._save(state, step)

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self._begun}

    def _save(self, state: State, step: int) -> None:
        began, path = time.perf_counter(), self._folder.checkpoint(step)
        part = self._folder.part(step)
        try:
            # Nothing of ours depends on the global generators that "rng" holds.
            save_checkpoint(state, template(part), ignore_keys=["rng"])
            if dist.get_global_rank() == 0:
                _publish(part, path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            good = self._folder.checkpoints()
            raise SettingError(
                f"cannot write {path}: {' '.join(str(error).split())[:200]}; "
                f"the last good checkpoint is {good[-1] if good else 'none'}"
            ) from error
        if dist.get_global_rank() == 0:
            for old in self._folder.checkpoints()[: -self._keep]:
                old.unlink()
            self._copy(path)
        self._took = time.perf_counter() - began


def _publish(part: Path, path: Path) -> None:
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)

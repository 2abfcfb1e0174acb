"""SIGTERM, as Slurm and Kubernetes send it before they take a machine away: the step is finished, a
checkpoint saved, and every rank ends with exit code 143."""

from __future__ import annotations

import signal
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.utils import dist

from training.folder import StageFolder

EXIT_CODE = 128 + signal.SIGTERM  # as a shell reports a process that the signal ended


class Terminated(Exception):
    """The run was asked to end, and goes on from what the message names."""


class StopAtSignal(Callback):
    """Ends the run after the step in which a rank got SIGTERM, and the checkpoint of that step.

    It has to stand behind `SaveCheckpoints`, which asks it whether to save. One serves all stages
    of a run: a signal that comes between two of them, or between two attempts, is not lost.
    """

    def __init__(self) -> None:
        self.folder: StageFolder | None = None
        """Of the stage that runs."""
        self._asked = False
        self._before: Any = None
        self.now = False
        """Whether this step is the last one; the same on all ranks."""

    def fit_start(self, state: State, logger: Logger) -> None:
        # Composer's own handler ends the process at once, with what was not saved yet.
        before = signal.signal(signal.SIGTERM, self._ask)
        if self._before is None:
            self._before = before

    def batch_end(self, state: State, logger: Logger) -> None:
        self.now = self._asked
        if dist.get_world_size() > 1:
            # Signals reach ranks at different steps; all have to end at the same one.
            asked = state.device.tensor_to_device(torch.tensor([int(self._asked)]))
            dist.all_reduce(asked, reduce_operation="MAX")
            self.now = bool(asked.item())

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.now and self.folder is not None:
            saved = self.folder.checkpoints()[-1:]
            raise Terminated(str(saved[0]) if saved else f"the beginning of {self.folder.path}")

    def close(self, state: State, logger: Logger) -> None:
        if self._asked or self.now:
            # To whichever rank the signal came, another is nothing new, and must end neither the
            # copying nor the process before its exit code: a launcher sends one to the last ranks.
            # Python takes its own handlers away before a process ends, but not this one.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

"""SIGTERM, as Slurm and Kubernetes send it before they take a machine away: the step is finished, a
checkpoint saved, and every rank ends with exit code 143."""

from __future__ import annotations

import signal
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.utils import dist

EXIT_CODE = 128 + signal.SIGTERM  # as a shell reports a process that the signal ended


class Terminated(Exception):
    """The run was asked to end, and its state is saved."""


class StopAtSignal(Callback):
    """Ends the run after the step in which a rank got SIGTERM, and the checkpoint of that step.

    It has to stand behind `SaveCheckpoints`, which asks it whether to save.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._asked = False
        self._before: Any = None
        self.now = False
        """Whether this step is the last one; the same on all ranks."""

    def fit_start(self, state: State, logger: Logger) -> None:
        # Composer's own handler ends the process at once, with what was not saved yet.
        self._before = signal.signal(signal.SIGTERM, self._ask)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.now = self._asked
        if dist.get_world_size() > 1:
            # Signals reach ranks at different steps; all have to end at the same one.
            asked = state.device.tensor_to_device(torch.tensor([int(self._asked)]))
            dist.all_reduce(asked, reduce_operation="MAX")
            self.now = bool(asked.item())

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.now:
            raise Terminated(f"stage {self._stage}, step {state.timestamp.batch.value}")

    def close(self, state: State, logger: Logger) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

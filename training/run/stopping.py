"""SIGTERM, as Slurm and Kubernetes send it before they take a machine away: the step is finished, a
checkpoint saved, and every rank ends with exit code 143."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.utils import dist

from training.checkpoint.run_folder import StageFolder

EXIT_CODE = 128 + signal.SIGTERM  # as a shell reports a process that the signal ended


class Terminated(Exception):
    """The run was asked to end, and goes on from what the message names."""


class StopAtSignal(Callback):
    """Ends the run after the step in which a rank got SIGTERM, and the checkpoint of that step.

    It has to stand behind `SaveCheckpoints`, which asks it whether to save. One serves all stages
    of a run: a signal that comes between two of them, or between two attempts, ends it at once.
    """

    def __init__(self) -> None:
        self.folder: StageFolder | None = None
        """Of the stage that runs."""
        self._steps = False
        self.asked = False
        """Whether this rank got the signal."""
        self.now = False
        """Whether this step is the last one; the same on all ranks."""

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the signal raises `Terminated`: at once, or after the step where one runs."""
        before = signal.getsignal(signal.SIGTERM)
        self.listen()
        try:
            yield
        except BaseException as error:
            if self.asked and isinstance(error, RuntimeError):
                # Another rank has ended before this one, which is nothing to complain of.
                raise Terminated(self.place()) from error
            if not self.asked and isinstance(error, Exception):
                signal.signal(signal.SIGTERM, before)
            raise
        signal.signal(signal.SIGTERM, before)

    def listen(self) -> None:
        """Again, wherever Composer's own handler took the place, which ends the process with what
        was not saved yet, and other ranks with a traceback."""
        signal.signal(signal.SIGTERM, self._ask)

    def place(self) -> str:
        """From where the run goes on."""
        if self.folder is None:
            return "its beginning"
        saved = self.folder.checkpoints()[-1:]
        return str(saved[0]) if saved else f"the beginning of {self.folder.path}"

    def fit_start(self, state: State, logger: Logger) -> None:
        self._steps = True
        self.listen()

    def batch_end(self, state: State, logger: Logger) -> None:
        self.now = self.asked
        if dist.get_world_size() > 1:
            # Signals reach ranks at different steps; all have to end at the same one.
            asked = state.device.tensor_to_device(torch.tensor([int(self.asked)]))
            dist.all_reduce(asked, reduce_operation="MAX")
            self.now = bool(asked.item())

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.now:
            raise Terminated(self.place())

    def close(self, state: State, logger: Logger) -> None:
        self._steps = False
        if self.asked or self.now:
            # To whichever rank the signal came, another is nothing new, and must end neither the
            # copying nor the process before its exit code: a launcher sends one to the last ranks.
            # Python takes its own handlers away before a process ends, but not this one.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit)
        if not self._steps and not interrupted:  # nothing to save
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise Terminated(self.place())

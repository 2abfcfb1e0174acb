"""How far a stage is: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time

from composer import Callback, Logger, State
from composer.utils import dist


class Progress(Callback):
    """Loss (mean since the last report), samples/s, share of time spent waiting for data, ETA.

    Args:
        stage: the stage's name.
        steps: its length.
        every: seconds between lines where standard error is no terminal.
    """

    def __init__(self, stage: str, steps: int, every: float) -> None:
        self._stage = stage
        self._steps = steps
        self._terminal = sys.stderr.isatty()
        self._every = 0.5 if self._terminal else every
        self._active = dist.get_global_rank() == 0
        self._bar = None

    def fit_start(self, state: State, logger: Logger) -> None:
        if self._active and self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn(self._stage),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.description}"),
                console=Console(stderr=True),
                auto_refresh=False,  # no thread that competes with the trainer
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps)
        self._began = self._reset(state)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._waiting_since = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._waited += time.perf_counter() - self._waiting_since

    def batch_end(self, state: State, logger: Logger) -> None:
        self._losses.append(state.total_loss_dict["loss/train/total"])
        step, now = state.timestamp.batch.value, time.perf_counter()
        if now - self._since < self._every and step != self._steps:
            return
        seconds = now - self._since
        rate = (state.timestamp.sample.value - self._samples) / seconds
        loss = sum(self._losses) / len(self._losses)
        waited = self._waited / seconds
        done = step - self._first_step
        left = (now - self._began) / done * (self._steps - step)
        logger.log_metrics({"train/samples_per_second": rate, "train/data_wait_share": waited})
        if self._active:
            self._show(
                step,
                f"loss {loss:.4f}  {rate:.0f} samples/s  data wait {waited:.1%}  "
                f"ETA {_clock(left)}",
            )
        self._reset(state)

    def close(self, state: State, logger: Logger) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _reset(self, state: State) -> float:
        if not hasattr(self, "_first_step"):
            self._first_step = state.timestamp.batch.value
        self._losses: list[float] = []
        self._waited = 0.0
        self._samples = state.timestamp.sample.value
        self._since = time.perf_counter()
        return self._since

    def _show(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text, refresh=True)
        else:
            print(f"{self._stage} {step}/{self._steps}  {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

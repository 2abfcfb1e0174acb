"""How far a stage is: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time

from composer import Callback, Logger, State
from composer.utils import dist

from training.observe.meter import DeviceHours, Meter
from training.observe.metrics import Price
from training.optim.guard import Guard


class Progress(Callback):
    """Loss (mean since the last report), speed, share of time spent waiting for data, ETA.

    Args:
        stage: the stage's name.
        steps: its length.
        every: seconds between lines where standard error is no terminal.
    """

    def __init__(
        self,
        stage: str,
        steps: int,
        every: float,
        meter: Meter,
        guard: Guard,
        bill: DeviceHours,
        price: Price,
    ) -> None:
        self._stage = stage
        self._steps = steps
        self._meter = meter
        self._guard = guard
        self._bill = bill
        self._price = price
        self._terminal = sys.stderr.isatty()
        self._every = 0.5 if self._terminal else every
        self._active = dist.get_global_rank() == 0
        self._bar = None

    def fit_start(self, state: State, logger: Logger) -> None:
        if self._active and self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            name = Column(min_width=len(self._stage), no_wrap=True)
            self._bar = Progress(
                TextColumn(self._stage, table_column=name),
                BarColumn(bar_width=16),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.description}"),
                console=Console(stderr=True),
                auto_refresh=False,  # no thread that competes with the trainer
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps)
        self._began: float | None = None
        self._since = time.perf_counter()
        self._shown = self._meter.totals

    def batch_end(self, state: State, logger: Logger) -> None:
        step, now = state.timestamp.batch.value, time.perf_counter()
        if self._began is None:  # the first step compiles and fills caches: no measure for the rest
            self._began, self._first = now, step
        if now - self._since < self._every and step != self._steps:
            return
        window = self._meter.totals - self._shown
        self._shown, self._since = self._meter.totals, now
        rates = window.rates(self._price.peak_flops)
        words = [f"loss {window.mean_loss():.4f}"]
        if step > self._first:
            left = (now - self._began) / (step - self._first) * (self._steps - step)
            words.append(f"ETA {_clock(left)}")
        words.append(f"{rates['samples_per_second']:.0f} samples/s")
        if "mfu" in rates:
            words.append(f"MFU {rates['mfu']:.0%}")
        else:
            words.append(f"{rates['tflops_per_device']:.3g} TFLOP/s")
        words.append(f"data wait {rates['data_wait_share']:.1%}")
        if self._price.dollars_per_hour is not None:
            dollars = self._bill.device_seconds() / 3600 * self._price.dollars_per_hour
            words.append(f"${dollars:,.2f}")
        if self._guard.skipped:
            words.append(f"{self._guard.skipped} skipped")
        if self._active:
            self._show(step, "  ".join(words))

    def close(self, state: State, logger: Logger) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text, refresh=True)
        else:
            print(f"{self._stage} {step}/{self._steps}  {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

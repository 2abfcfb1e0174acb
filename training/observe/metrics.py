"""What a run says of itself, to loggers and to <stage>/metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from composer import Callback, Logger, State

from training.observe.meter import DeviceHours, Meter, Totals
from training.observe.metrics_log import Journal
from training.optim.guard import Guard


@dataclass(frozen=True)
class Price:
    """Of the devices of a run; figures that are not known are not logged."""

    peak_flops: float | None = None  # of one device, FLOP/s
    dollars_per_hour: float | None = None  # of one device


class Metrics(Callback):
    """Loss, rate and gradient norm of every step; speed and costs of every `every` steps.

    The journal has every step. Loggers get one step in `every`: calling them takes time. Comes
    after meter and guard, and before callbacks that `report` something themselves.

    Args:
        journal: of the stage; None on ranks that write none.
        rate: step (0 is the first) -> learning rate.
        steps: of the stage.
        say: shows a line (step, text) to the user.
    """

    def __init__(
        self,
        meter: Meter,
        guard: Guard,
        bill: DeviceHours,
        price: Price,
        journal: Journal | None,
        rate: Callable[[int], float],
        steps: int,
        every: int,
        say: Callable[[int, str], None],
    ) -> None:
        self._meter = meter
        self._guard = guard
        self._bill = bill
        self._price = price
        self._journal = journal
        self._rate = rate
        self._steps = steps
        self._every = every
        self._say = say
        self._reported = Totals()

    def fit_start(self, state: State, logger: Logger) -> None:
        if self._journal is not None and (lost := self._journal.cut(state.timestamp.batch.value)):
            self._say(state.timestamp.batch.value, f"metrics.jsonl: {lost} broken lines left out")

    def batch_end(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        values: dict[str, Any] = {
            "train/loss": state.total_loss_dict["loss/train/total"],
            "train/lr": self._rate(step - 1),
            "train/grad_norm": self._guard.norm,
            "guard/skipped": self._guard.skipped,
            "guard/rollbacks": self._guard.rollbacks,
        }
        if step % self._every and step != self._steps:
            self._note(step, values)
            return
        window = self._meter.totals - self._reported
        self._reported = self._meter.totals
        values["train/loss_mean"] = window.mean_loss()
        rates = window.rates(self._price.peak_flops)
        values |= {f"train/{name}": value for name, value in rates.items()}
        values["train/stalls"] = self._meter.totals.stalls
        hours = self._bill.device_seconds() / 3600
        values["train/device_hours"] = hours
        if self._price.dollars_per_hour is not None:
            values["train/dollars"] = hours * self._price.dollars_per_hour
        self.report(step, values, logger)

    def report(self, step: int, values: dict[str, Any], logger: Logger) -> None:
        """Values of a step that loggers and the journal get."""
        logger.log_metrics(values, step)
        self._note(step, values)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        if step % self._every == 0 or step == self._steps:
            self.write()

    def close(self, state: State, logger: Logger) -> None:
        self.write()

    def write(self) -> None:
        """Puts the journal on disk, up to the last step."""
        if self._journal is not None:
            self._journal.write()

    def state_dict(self) -> dict[str, Any]:
        return {"device_seconds": self._bill.device_seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._bill.raise_to(state["device_seconds"])

    def _note(self, step: int, values: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.add(step, values)


def price_of(device: str, peak_tflops: float, dollars_per_hour: float) -> Price:
    """What is stated of GPUs holds on GPUs; of a CPU neither peak nor price is known."""
    if device != "gpu":
        return Price()
    return Price(peak_tflops * 1e12, dollars_per_hour)

"""Steps that would do harm are not made; where they come in a row, the stage goes back.

A step is bad where its loss or the norm of its gradients is no number, or, where a threshold is
set, far above what it was of late. A bad step's gradients are thrown away: weights, moments and
averages stay, the step counts. After `in_a_row` bad steps the guard raises `RollBack`, and the
stage goes on from its last checkpoint with other noise and another order of the data. No checkpoint
is made while the last step was bad.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch import Tensor, nn

from training.config.settings import Guard as Settings
from training.optim.dtensors import local, whole
from training.optim.ema import EMA

NORMAL = 1.4826  # a normal distribution's standard deviation in median absolute deviations


class RollBack(Exception):
    """The stage cannot go on from here."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step = step
        self.reason = reason


class Guard(Callback):
    """Reads the loss and the gradients' norm of each step once, then skips it or clips it.

    That is where Composer waits for the device anyway, to read the loss itself. All ranks see the
    same two numbers, so they decide alike.

    Args:
        clip: largest norm of the gradients of all micro-batches together; None: any.
        ema: told not to count a step that was skipped.
        rollbacks: how often the stage was rolled back so far; it travels with each checkpoint.
        say: shows a line (step, text) to the user.
    """

    def __init__(
        self,
        settings: Settings,
        clip: float | None,
        ema: EMA,
        rollbacks: int,
        say: Callable[[int, str], None],
    ) -> None:
        self.norm = math.nan  # of the last step's gradients, before clipping
        self.skipped = 0  # steps of the stage
        self.in_a_row = 0  # bad steps up to the last one
        self.rollbacks = rollbacks
        self._settings = settings
        self._say = say
        self._clip = clip
        self._ema = ema
        self._losses: deque[float] = deque(maxlen=settings.window)
        self._norms: deque[float] = deque(maxlen=settings.window)
        self._reason = ""

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._loss, self._samples = torch.zeros((), device=_device(state)), 0

    def after_backward(self, state: State, logger: Logger) -> None:
        loss = cast(Tensor, state.loss["total"] if isinstance(state.loss, dict) else state.loss)
        samples = len(state.batch["latents"])
        self._loss += samples * loss.detach().mean()
        self._samples += samples

    def after_train_batch(self, state: State, logger: Logger) -> None:
        parameters = [p for p in state.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])  # pyright: ignore
        norm = whole(norm)
        both = torch.stack((self._loss / self._samples, norm.float()))
        dist.all_reduce(both, reduce_operation="SUM")  # what is no number stays none in a sum
        loss, self.norm = (both / dist.get_world_size()).tolist()
        self._reason = self._judge(loss, self.norm)
        self._ema.skip = bool(self._reason)
        if self._reason:
            self.skipped += 1
            self.in_a_row += 1
            for parameter in parameters:
                parameter.grad = None  # an optimizer passes over parameters without one
        else:
            self.in_a_row = 0
            if self._clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Raises RollBack where this bad step is one too many."""
        if not self._reason:
            return
        step = state.timestamp.batch.value
        if self.in_a_row >= self._settings.in_a_row:
            raise RollBack(step, f"{self._reason}, {self.in_a_row} bad steps in a row")
        self._say(
            step,
            f"{self._reason}: step skipped ({self.in_a_row} in a row, {self.skipped} of the stage)",
        )

    def require_finite(self, state: State) -> None:
        """Raises RollBack where a weight is no number: it must not get into a checkpoint."""
        weights = map(local, state.model.parameters())
        finite = torch.stack([weight.isfinite().all() for weight in weights]).all().int()
        dist.all_reduce(finite, reduce_operation="MIN")  # ranks may hold different parts
        if not finite.item():
            reason = " and ".join(filter(None, (self._reason, "weights are no numbers")))
            raise RollBack(state.timestamp.batch.value, reason)

    def state_dict(self) -> dict[str, Any]:
        return {
            "rollbacks": self.rollbacks,
            "skipped": self.skipped,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])

    def _judge(self, loss: float, norm: float) -> str:
        """What is wrong with a step; empty where nothing is."""
        settings, reasons = self._settings, []
        for name, value, history, deviations in (
            ("loss", loss, self._losses, settings.loss_spike),
            ("gradient norm", norm, self._norms, settings.grad_spike),
        ):
            limit = math.inf if deviations is None else threshold(history, deviations)
            if not math.isfinite(value):
                reasons.append(f"the {name} is {value}")
                continue
            if value > limit:
                reasons.append(f"the {name} is {value:.4g}, above {limit:.4g}")
            history.append(value)  # also of a bad step: a lasting rise becomes the new normal
        return " and ".join(reasons)


def threshold(history: deque[float], deviations: float) -> float:
    """Median + deviations * 1.4826 MAD of a full window; infinity before it is full.

    Median and MAD do not move with the outliers that they are to tell.
    """
    if len(history) < (history.maxlen or 0):
        return math.inf
    middle = statistics.median(history)
    spread = statistics.median(abs(value - middle) for value in history)
    return middle + deviations * NORMAL * spread


def _device(state: State) -> torch.device:
    return next(state.model.parameters()).device

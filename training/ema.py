"""Exponential moving average of the weights: what a finished run generates with.

Composer's own EMA averages integer buffers and frozen modules too, leaves the average in the live
model, and stores it in the place of the weights. This one averages parameters only and keeps them
under their own key of the checkpoint: state/callbacks/EMA/average.
"""

from __future__ import annotations

from typing import Any

import torch
from composer import Callback, Logger, State
from torch import Tensor, nn


class EMA(Callback):
    """average <- decay * average + (1 - decay) * weights, after every optimizer step.

    Args:
        network: whose parameters are averaged.
        decay: a step; None keeps no average.
        start: at this step of the stage the average restarts as a copy of the weights; with 0 it
            goes on from `average`, or from the stage's first weights.
        average: by parameter name, as an earlier stage left it.
    """

    def __init__(
        self,
        network: nn.Module,
        decay: float | None,
        start: int = 0,
        average: dict[str, Tensor] | None = None,
    ) -> None:
        self._parameters = dict(network.named_parameters())
        self._decay = decay
        self._start = start
        self._average = average if decay is not None and start == 0 else None
        self.skip = False  # set by the guard: the last step changed no weight

    def fit_start(self, state: State, logger: Logger) -> None:
        device = next(iter(self._parameters.values())).device
        if self._average is not None:
            self._average = {k: v.to(device) for k, v in self._average.items()}
        elif state.timestamp.batch.value == 0:
            self._begin(0)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.skip:
            return
        if self._average is None:
            self._begin(state.timestamp.batch.value)
        else:
            assert self._decay is not None
            values = [self._average[name] for name in self._parameters]
            torch._foreach_lerp_(values, self._weights(), 1 - self._decay)  # pyright: ignore

    def averaged(self) -> dict[str, Tensor]:
        """The average by parameter name; the weights themselves where there is none."""
        return self._average or {k: v.detach() for k, v in self._parameters.items()}

    def averages(self) -> dict[str, dict[str, Tensor]]:
        """Every average that there is by now: its name -> tensors by parameter name."""
        return {} if self._average is None else {"ema": self._average}

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average = state["average"]

    def _begin(self, step: int) -> None:
        if self._decay is not None and step >= self._start:
            names, weights = self._parameters, self._weights()
            self._average = {k: v.clone() for k, v in zip(names, weights, strict=True)}

    def _weights(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters.values()]

"""Averages of the weights over the steps: what a finished run generates with.

Composer's own EMA averages integer buffers and frozen modules too, leaves the average in the live
model, and stores it in the place of the weights. This one averages parameters only, in as many
ways at once as asked for, and keeps them under their own key of the checkpoint:
state/callbacks/EMA/averages.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from composer import Callback, Logger, State
from torch import Tensor, nn

from training.checkpoint.checkpoints import Average
from training.config.stage_settings import Power
from training.optim.dtensors import gathered, local, parts_as, reshard


class EMA(Callback):
    """average <- beta * average + (1 - beta) * weights, after every optimizer step.

    beta is the decay, or (1 - 1/t)^(gamma + 1) for a power function at its update t (Karras et al.
    2024, arXiv 2312.02696, equation 127): the weights of step i then count as much as i^gamma.

    Args:
        network: whose parameters are averaged.
        profiles: by name, the decay or the power of each average; none keeps no average.
        start: at this step of the stage averages restart as copies of the weights; with 0 one goes
            on from `before`, or from the stage's first weights.
        before: the averages by name, as an earlier stage left them.
    """

    def __init__(
        self,
        network: nn.Module,
        profiles: Mapping[str, float | Power],
        start: int = 0,
        before: Mapping[str, Average] | None = None,
    ) -> None:
        self._network = network
        self._exponents = {n: _exponent(p) for n, p in profiles.items() if isinstance(p, Power)}
        self._decays = {n: p for n, p in profiles.items() if not isinstance(p, Power)}
        self._names = list(profiles)
        self._start = start
        kept = before if before is not None and start == 0 else {}
        self._averages = {name: kept[name] for name in profiles if name in kept}
        self.skip = False  # set by the guard: the last step changed no weight

    def fit_start(self, state: State, logger: Logger) -> None:
        weights = dict(self._network.named_parameters())
        for name, average in self._averages.items():
            values = {k: parts_as(v, weights[k]) for k, v in average["values"].items()}
            self._averages[name] = {"updates": average["updates"], "values": values}
        if state.timestamp.batch.value == 0:
            self._begin(0)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.skip:
            return
        begun = list(self._averages.items())
        self._begin(state.timestamp.batch.value)
        for name, average in begun:
            average["updates"] += 1
            weights = self._weights()
            values = [local(average["values"][key]) for key in weights]
            parts = [local(weight) for weight in weights.values()]
            weight = 1 - self._beta(name, average["updates"])
            torch._foreach_lerp_(values, parts, weight)  # pyright: ignore

    def averages(self) -> dict[str, dict[str, Tensor]]:
        """Every average that there is by now, by parameter name: "ema", the main one, first, the
        others as "ema-NAME"."""
        begun = [name for name in self._names if name in self._averages]
        return {
            "ema" if name == self._names[0] else f"ema-{name}": self._averages[name]["values"]
            for name in begun
        }

    def state_dict(self) -> dict[str, Any]:
        """All ranks have to ask together: averages of weights in parts are gathered."""
        return {
            "averages": {
                name: {"updates": average["updates"], "values": gathered(average["values"])}
                for name, average in self._averages.items()
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averages = state["averages"]

    def _begin(self, step: int) -> None:
        if step >= self._start:
            for name in self._names:
                if name not in self._averages:
                    values = {key: weight.clone() for key, weight in self._weights().items()}
                    self._averages[name] = {"updates": 0, "values": values}

    def _beta(self, name: str, update: int) -> float:
        if name in self._exponents:
            return (1 - 1 / update) ** self._exponents[name]
        return self._decays[name]

    def _weights(self) -> dict[str, Tensor]:
        # Asked for each time: FSDP2 puts others in their place when the trainer is made.
        return {name: weight.detach() for name, weight in self._network.named_parameters()}


def _exponent(profile: Power) -> float:
    """gamma + 1, of which the width is sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) (arXiv
    2312.02696, equation 123): by halving, as the width falls from gamma = 0 on."""
    low, high = 1.0, 1 / profile.power
    for _ in range(60):
        middle = (low + high) / 2
        if math.sqrt(middle / (middle + 2)) / (middle + 1) > profile.power:
            low = middle
        else:
            high = middle
    return low


@contextlib.contextmanager
def swap_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """In this block the network holds these weights, and they hold the network's own.

    Values move, tensor by tensor and in place: no second copy of a model is made, compiled code,
    which knows tensors by their address, sees the change, and every bit comes back.

    Args:
        weights: by parameter name, of the parameters' shapes, types and devices, and in the same
            parts where ranks hold a part each.
    """
    reshard(network)
    # Allocated before the first value moves: want of memory must not leave half of them moved.
    largest = max(map(local, network.parameters()), key=Tensor.numel)
    spare = torch.empty_like(largest).flatten()
    _swap(network, weights, spare)
    try:
        yield
    finally:
        reshard(network)
        _swap(network, weights, spare)


@torch.no_grad()
def _swap(network: nn.Module, weights: Mapping[str, Tensor], spare: Tensor) -> None:
    for name, parameter in network.named_parameters():
        own, other = local(parameter), local(weights[name])
        held = spare[: own.numel()].view_as(own)
        held.copy_(own)
        own.copy_(other)
        other.copy_(held)

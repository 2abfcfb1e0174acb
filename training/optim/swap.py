"""Other weights in the very same network: compiled, it works on as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from training.optim.dtensors import local, reshard


@contextlib.contextmanager
def swapped(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
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

"""Other weights in the very same network: compiled or sharded, it works on as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def swapped(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """In this block the network holds these weights, and they hold the network's own.

    Values move, tensor by tensor and in place: no second copy of a model is made, compiled code and
    shards, which know tensors by their address, see the change, and every bit comes back.

    Args:
        weights: by parameter name, of the parameters' shapes, types and devices.
    """
    _swap(network, weights)
    try:
        yield
    finally:
        _swap(network, weights)


@torch.no_grad()
def _swap(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in network.named_parameters():
        held = parameter.clone()
        parameter.copy_(weights[name])
        weights[name].copy_(held)

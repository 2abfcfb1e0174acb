"""Tensors of which each rank holds a part (FSDP2), and how to get at the part or the whole.

Plain tensors, as on one rank or with DDP, pass through every function here as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part, over the same memory and without a gradient."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def whole(tensor: Tensor) -> Tensor:
    """All of it, without a gradient; all ranks have to ask for it together."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def parts_as(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor that every rank has -> on the device of `model`, and in parts as that is."""
    tensor = tensor.to(model.device)
    if isinstance(tensor, DTensor) or not isinstance(model, DTensor):
        return tensor
    part = distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)
    return part.clone()  # it is a view, and would keep the whole in memory


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each; all ranks have to ask together. Those in parts end on the first rank's
    CPU, and other ranks get None of them: a model need not fit into one device twice."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if not isinstance(tensor, DTensor):
            found[name] = value
        elif torch.distributed.get_rank() == 0:
            found[name] = value.cpu()
    return found


def reshard(network: nn.Module) -> None:
    """Back to parts where a forward pass without a backward one left weights whole, which FSDP2
    does with the outermost module's."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

"""Several ranks, each with all weights (DDP, Composer's default) or with a part of them (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.core.errors import SettingError
from training.config.settings import Config
from training.network.blocks import DiTBlock
from training.network.decoder import DecoderBlock
from training.objectives.sampler import TextConditioned
from training.ranks import world_size

if TYPE_CHECKING:
    from composer.utils import ParallelismConfig

UNITS = (DiTBlock, DecoderBlock)
"""What is gathered, computed and let go again as one. All other weights (those of captions, of the
noise level and of the final layer) are whole during a step."""


def check(config: Config) -> None:
    """That this machine can train as `parallel` says.

    Raises:
        SettingError: names the setting and a remedy.
    """
    if config.parallel == "ddp":
        return
    if world_size() == 1:
        raise SettingError(
            "parallel=fsdp2: one rank has nothing to share weights with; start it with "
            "`composer -n N training/train.py …`, or set parallel=ddp"
        )
    if not torch.cuda.is_available():
        raise SettingError(
            "parallel=fsdp2: no CUDA device here, and it is for weights that do not fit into one; "
            "set parallel=ddp"
        )


def settings(config: Config) -> ParallelismConfig | None:
    """What Composer is told; None for DDP, which it does by itself.

    Weights stay float32 and are gathered as such: autocast makes of them what it makes of them with
    DDP. Checkpoints are whole, on the first rank, so a run goes on with any number of ranks.
    """
    if config.parallel == "ddp":
        return None
    from composer.utils import FSDP2Config, ParallelismConfig

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2 Config/APIs are experimental")
        fsdp2 = FSDP2Config(
            reshard_after_forward=True, state_dict_type="full", mixed_precision="FULL"
        )
    return ParallelismConfig(fsdp2=fsdp2)


def is_unit(module: nn.Module) -> bool:
    """Composer asks it of the network's modules, as its `fsdp_wrap_fn`."""
    return isinstance(module, UNITS)


class CaptionsEachTime:
    """A network for `sample`, whose captions are read anew at each step.

    Weights that are shared among ranks are whole during the network's own `forward` only, so
    nothing can be read once and kept.
    """

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self._network = network

    def encode_text(self, y: Tensor, y_mask: Tensor | None = None) -> Any:
        return y, y_mask

    def __call__(self, x: Tensor, c_noise: Tensor, y: Any) -> Tensor:
        return self._network(x, c_noise, *y)


def for_sampling(network: nn.Module) -> TextConditioned:
    """The network itself, or where its weights are shared what `sample` can use of it."""
    from torch.distributed.fsdp import FSDPModule

    return CaptionsEachTime(network) if isinstance(network, FSDPModule) else network  # pyright: ignore

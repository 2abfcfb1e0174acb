"""The seam between a network and whoever trains or samples it, and what all objectives share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from training.network.tokens import ExtraLoss, TokenMask

Network = Callable[..., Tensor]
"""F(x (B, C, S, S), c_noise (B,) or (1,), y=..., ...) -> (B, C, S, S)."""


class Denoiser(Protocol):
    """An objective: the meaning of a noise level, and of a raw network's output.

    A noisy latent at level s is a(s) x + s eps. Levels fall to 0, where it is clean; a sampler
    follows dx/ds = (x - D(x; s)) / s.
    """

    name: ClassVar[str]
    """Its key in `training.objectives.OBJECTIVES`."""

    def level(self, normal: Tensor) -> Tensor:
        """Unit normal numbers -> noise levels as training draws them, same shape."""
        ...

    def levels(self, steps: int, device: torch.device | None = None) -> Tensor:
        """The levels of a sampler, from noise to 0: float64 (steps + 1,), falling."""
        ...

    def denoise(self, network: Network, x: Tensor, level: Tensor, **conditions: Any) -> Tensor:
        """D(x; level): such that (x - D) / level is the slope of the sampler's path.

        Args:
            network: F; ``conditions`` (y, y_mask, mask) are handed to it.
            x: noisy latents (B, C, S, S), computed in float32, or float64 if they are.
            level: noise level of each sample, B values or one, in any shape.

        Returns:
            (B, C, S, S) in the precision of the computation.
        """
        ...

    def loss(
        self,
        network: Network,
        latents: Tensor,
        level: Tensor,
        eps: Tensor,
        y: Tensor,
        y_mask: Tensor | None = None,
        mask: TokenMask | None = None,
        extra: ExtraLoss | None = None,
    ) -> Tensor:
        """Training loss of each sample, float (B,); its mean is the training loss.

        Args:
            latents: clean latents (B, C, S, S).
            level: noise level of each sample, B values in any shape.
            eps: unit normal noise (B, C, S, S).
            y: captions as the network takes them.
            y_mask: which caption rows are real, bool (B, L), or None for all.
            mask: which patches the network sees, or None for all. Those it drops do not count, and
                the mean is over the others: masked and unmasked losses have one scale.
            extra: a term that is added where there is a mask.
        """
        ...


def mean_over_kept(error: Tensor, mask: TokenMask | None) -> Tensor:
    """Error of each latent value (B, C, S, S) -> its mean over the kept patches, (B,)."""
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    patch = error.shape[-1] // math.isqrt(mask.mask.shape[1])
    error = F.avg_pool2d(error.mean(dim=1), patch).flatten(1)  # (B, T)
    kept = 1 - mask.mask.to(error.dtype)
    return (error * kept).sum(dim=1) / kept.sum(dim=1)


def precision(x: Tensor) -> torch.dtype:
    """float32, or what is more precise."""
    return torch.promote_types(x.dtype, torch.float32)

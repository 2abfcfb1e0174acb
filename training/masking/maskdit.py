"""MaskDiT (Zheng et al. 2023, arXiv 2306.09305): naive masking, a decoder, a reconstruction loss.

The decoder is a part of the network: `training.network.decoder`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.masking.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from training.network.config import DiTConfig
    from training.network.tokens import ExtraLoss, Skips, TokenMask

RECONSTRUCTION_WEIGHT = 0.1
"""Lambda of the paper's total loss."""
VARIANCE_EPS = 1e-6


def reconstruction(noisy: Tensor, denoised: Tensor, mask: TokenMask) -> Tensor:
    """Weighted error of the dropped patches against the noisy input, each normalised to itself.

    As in MAE (arXiv 2111.06377) the target of a patch is (x - mean) / sqrt(var + 1e-6) over its own
    values, with the unbiased variance. Its mean is over the dropped patches.

    Args:
        noisy: what was to be denoised, (B, C, S, S).
        denoised: the denoiser's output D, (B, C, S, S).
        mask: which patches were dropped.

    Returns:
        (B,).
    """
    target = _patches(noisy, mask)
    variance, mean = target.var(dim=2, keepdim=True), target.mean(dim=2, keepdim=True)
    target = (target - mean) / (variance + VARIANCE_EPS).sqrt()
    error = (_patches(denoised, mask) - target).square().mean(dim=2)  # (B, T)
    dropped = mask.mask.to(error.dtype)
    return RECONSTRUCTION_WEIGHT * (error * dropped).sum(dim=1) / dropped.sum(dim=1)


@dataclass(frozen=True)
class MaskDiT(Scheme):
    """Tokens are dropped right after the patch embedding; the decoder fills in their places."""

    @property
    def skips(self) -> Skips:
        return "network"

    def extra_loss(self) -> ExtraLoss:
        return reconstruction

    def check(self, config: DiTConfig) -> None:
        if not config.decoder_depth:
            raise ValueError("mask maskdit without a decoder: set model.decoder_depth, e.g. 8")


def _patches(x: Tensor, mask: TokenMask) -> Tensor:
    """(B, C, S, S) -> (B, T, p * p * C)."""
    patch = x.shape[-1] // math.isqrt(mask.mask.shape[1])
    tiles = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, g, p, g, p)
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

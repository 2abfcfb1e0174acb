"""EDM preconditioning and loss (Karras et al. 2022, arXiv 2206.00364, Table 1).

Wraps a raw network F into a denoiser D(x; sigma) whose inputs, outputs and targets have unit
variance at every noise level. Nothing here knows which network it wraps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.masking.tokens import ExtraLoss, TokenMask

Network = Callable[..., Tensor]
"""F(x (B, C, S, S), c_noise (B,) or (1,), y=..., ...) -> (B, C, S, S)."""


@dataclass(frozen=True)
class EDM:
    """Noise levels and preconditioning; the defaults are MicroDiT's at 256 px.

    Raises:
        ValueError: a scale that is not positive, or sigma_min above sigma_max.
    """

    sigma_data: float = 0.9
    """Standard deviation of the latents (EDM's own default, for pixels, is 0.5)."""
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    p_mean: float = -0.6
    """Mean of ln(sigma) in training; 0.0 at 512 px."""
    p_std: float = 1.2
    """Standard deviation of ln(sigma) in training; 0.6 at 512 px."""

    def __post_init__(self) -> None:
        for name in ("sigma_data", "sigma_min", "p_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be above 0")
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_max {self.sigma_max}: must exceed sigma_min {self.sigma_min}")

    def sigma(self, normal: Tensor) -> Tensor:
        """Unit normal numbers -> training noise levels, ln(sigma) ~ N(p_mean, p_std^2)."""
        return (self.p_std * normal + self.p_mean).exp()

    def denoise(self, network: Network, x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), EDM equation 7.

        Args:
            network: F; ``conditions`` (y, y_mask, mask) are handed to it.
            x: noisy latents (B, C, S, S), computed in float32, or float64 if they are.
            sigma: noise level of each sample, B values or one, in any shape.

        Returns:
            Clean latents (B, C, S, S) in the precision of the computation.
        """
        dtype = _precision(x)
        x, sigma = x.to(dtype), sigma.to(dtype).reshape(-1, 1, 1, 1)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = sigma.log() / 4
        prediction = network(c_in * x, c_noise.flatten(), **conditions)
        return c_skip * x + c_out * prediction.to(dtype)

    def loss(
        self,
        network: Network,
        latents: Tensor,
        sigma: Tensor,
        eps: Tensor,
        y: Tensor,
        y_mask: Tensor | None = None,
        mask: TokenMask | None = None,
        extra: ExtraLoss | None = None,
    ) -> Tensor:
        """Weighted denoising error of each sample, EDM equation 8 with lambda = 1 / c_out^2.

        With a mask only the patches that are not dropped count, and their mean is over themselves,
        so that masked and unmasked losses have the same scale.

        Args:
            latents: clean latents (B, C, S, S).
            sigma: noise level of each sample, B values in any shape.
            eps: unit normal noise (B, C, S, S).
            y: captions as the network takes them.
            y_mask: which caption rows are real, bool (B, L), or None for all.
            mask: which patches the network sees, and which count, or None for all.
            extra: a term that is added where there is a mask.

        Returns:
            float (B,); its mean is the training loss.
        """
        dtype = _precision(latents)
        latents, eps, y = latents.to(dtype), eps.to(dtype), y.to(dtype)
        sigma = sigma.to(dtype).reshape(-1, 1, 1, 1)
        noisy = latents + sigma * eps
        denoised = self.denoise(network, noisy, sigma, y=y, y_mask=y_mask, mask=mask)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        error = weight * (denoised - latents) ** 2
        if mask is None:
            return error.mean(dim=(1, 2, 3))
        patch = latents.shape[-1] // math.isqrt(mask.mask.shape[1])
        error = F.avg_pool2d(error.mean(dim=1), patch).flatten(1)  # (B, T)
        kept = 1 - mask.mask.to(dtype)
        loss = (error * kept).sum(dim=1) / kept.sum(dim=1)
        return loss if extra is None else loss + extra(noisy, denoised, mask)


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

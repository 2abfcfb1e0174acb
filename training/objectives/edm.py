"""EDM preconditioning and loss (Karras et al. 2022, arXiv 2206.00364, Table 1).

Wraps a raw network F into a denoiser D(x; sigma) whose inputs, outputs and targets have unit
variance at every noise level. Nothing here knows which network it wraps.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from training.network.tokens import ExtraLoss, TokenMask
from training.objectives.denoiser import Network, mean_over_kept, precision

RHO = 7.0
"""Bends a sampler's noise levels towards sigma_min (EDM, Table 1)."""


@dataclass(frozen=True)
class EDM:
    """Noise levels and preconditioning; the defaults are MicroDiT's at 256 px.

    A `Denoiser` whose level is sigma: a noisy latent is x + sigma eps.

    Raises:
        ValueError: a scale that is not positive, or sigma_min above sigma_max.
    """

    name: ClassVar[str] = "edm"

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

    def level(self, normal: Tensor) -> Tensor:
        """Unit normal numbers -> training noise levels, ln(sigma) ~ N(p_mean, p_std^2)."""
        return (self.p_std * normal + self.p_mean).exp()

    def levels(self, steps: int, device: torch.device | None = None) -> Tensor:
        """sigma_max, ..., sigma_min, 0 (EDM equation 5): float64 (steps + 1,)."""
        ramp = torch.arange(steps, dtype=torch.float64, device=device) / max(steps - 1, 1)
        low, high = self.sigma_min ** (1 / RHO), self.sigma_max ** (1 / RHO)
        levels = (high + ramp * (low - high)) ** RHO
        return torch.cat((levels, levels.new_zeros(1)))

    def denoise(self, network: Network, x: Tensor, level: Tensor, **conditions: Any) -> Tensor:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), EDM equation 7.

        Args:
            network: F; ``conditions`` (y, y_mask, mask) are handed to it.
            x: noisy latents (B, C, S, S), computed in float32, or float64 if they are.
            level: sigma of each sample, B values or one, in any shape.

        Returns:
            Clean latents (B, C, S, S) in the precision of the computation.
        """
        dtype = precision(x)
        x, sigma = x.to(dtype), level.to(dtype).reshape(-1, 1, 1, 1)
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
        level: Tensor,
        eps: Tensor,
        y: Tensor,
        y_mask: Tensor | None = None,
        mask: TokenMask | None = None,
        extra: ExtraLoss | None = None,
    ) -> Tensor:
        """Weighted denoising error of each sample, EDM equation 8 with lambda = 1 / c_out^2.

        Arguments as for `Denoiser.loss`; with a mask only the kept patches count.
        """
        dtype = precision(latents)
        latents, eps, y = latents.to(dtype), eps.to(dtype), y.to(dtype)
        sigma = level.to(dtype).reshape(-1, 1, 1, 1)
        noisy = latents + sigma * eps
        denoised = self.denoise(network, noisy, sigma, y=y, y_mask=y_mask, mask=mask)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        loss = mean_over_kept(weight * (denoised - latents) ** 2, mask)
        return loss if extra is None or mask is None else loss + extra(noisy, denoised, mask)

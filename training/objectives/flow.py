"""Rectified flow (Liu et al. 2022, arXiv 2209.03003) with the noise levels of Stable Diffusion 3
(Esser et al. 2024, arXiv 2403.03206).

A straight line leads from a latent to its noise, x_t = (1 - t) x + t eps, and the network predicts
the velocity along it, eps - x. Nothing here knows which network it wraps.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from training.network.tokens import ExtraLoss, TokenMask
from training.objectives.denoiser import Network, mean_over_kept, precision

TIME_SCALE = 1000.0
"""The network is told 1000 t: over t alone, even the fastest wave of its sinusoid, sin(t), would
make but a sixth of a turn."""


@dataclass(frozen=True)
class Flow:
    """A `Denoiser` whose level is t in (0, 1]: 0 is a clean latent, 1 is pure noise.

    Raises:
        ValueError: a spread or a shift that is not positive.
    """

    name: ClassVar[str] = "flow"

    logit_mean: float = 0.0
    """Mean of logit(t) in training, before the shift; above 0 trains noisier latents more."""
    logit_std: float = 1.0
    """Standard deviation of logit(t) in training."""
    shift: float = 1.0
    """t becomes shift t / (1 + (shift - 1) t), in training and sampling (arXiv 2403.03206, equation
    23). More pixels need more noise to hide a picture: the root of the ratio of their numbers, 2
    from 256 to 512 px."""

    def __post_init__(self) -> None:
        for name in ("logit_std", "shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be above 0")

    def level(self, normal: Tensor) -> Tensor:
        """Unit normal numbers -> training levels, logit-normal (equation 19), then shifted."""
        return self._shifted(torch.sigmoid(self.logit_std * normal + self.logit_mean))

    def levels(self, steps: int, device: torch.device | None = None) -> Tensor:
        """1, ..., 0, evenly spaced before the shift: float64 (steps + 1,)."""
        ramp = torch.arange(steps, -1, -1, dtype=torch.float64, device=device) / steps
        return self._shifted(ramp)

    def denoise(self, network: Network, x: Tensor, level: Tensor, **conditions: Any) -> Tensor:
        """x_t - t v: what remains when the predicted velocity has run back to t = 0.

        Arguments as for `Denoiser.denoise`.
        """
        dtype = precision(x)
        x, t = x.to(dtype), level.to(dtype).reshape(-1, 1, 1, 1)
        return x - t * self._velocity(network, x, t, **conditions)

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
        """Squared error of the velocity of each sample, arXiv 2209.03003 equation 1.

        Arguments as for `Denoiser.loss`; the levels' distribution is the only weighting.
        """
        dtype = precision(latents)
        latents, eps, y = latents.to(dtype), eps.to(dtype), y.to(dtype)
        t = level.to(dtype).reshape(-1, 1, 1, 1)
        noisy = (1 - t) * latents + t * eps
        velocity = self._velocity(network, noisy, t, y=y, y_mask=y_mask, mask=mask)
        loss = mean_over_kept((velocity - (eps - latents)) ** 2, mask)
        if extra is None or mask is None:
            return loss
        return loss + extra(noisy, noisy - t * velocity, mask)

    def _velocity(self, network: Network, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        return network(x, TIME_SCALE * t.flatten(), **conditions).to(x.dtype)

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

"""Deterministic sampling with EDM's Heun solver (Karras et al. 2022, arXiv 2206.00364).

Algorithm 1 of the paper, that is algorithm 2 without churn, with classifier-free guidance
(Ho and Salimans 2022, arXiv 2207.12598). No random number is drawn here: the same noise and
captions give the same latents.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from training.denoiser import EDM

RHO = 7.0
"""Bends the noise levels towards sigma_min (EDM, Table 1)."""


class TextConditioned(Protocol):
    """A network that reads captions once and is then evaluated many times; see `MicroDiT`."""

    def encode_text(self, y: Tensor, y_mask: Tensor | None = None) -> Any: ...

    def __call__(self, x: Tensor, c_noise: Tensor, y: Any) -> Tensor: ...


def noise_levels(edm: EDM, steps: int, device: torch.device | None = None) -> Tensor:
    """sigma_max, ..., sigma_min, 0 (EDM equation 5): float64 (steps + 1,).

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps {steps}: must be at least 1")
    ramp = torch.arange(steps, dtype=torch.float64, device=device) / max(steps - 1, 1)
    low, high = edm.sigma_min ** (1 / RHO), edm.sigma_max ** (1 / RHO)
    levels = (high + ramp * (low - high)) ** RHO
    return torch.cat((levels, levels.new_zeros(1)))


@torch.no_grad()
def sample(
    network: TextConditioned,
    edm: EDM,
    noise: Tensor,
    y: Tensor,
    y_mask: Tensor | None = None,
    steps: int = 30,
    guidance: float = 5.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Turn unit noise into latents, with 2 * steps - 1 network evaluations.

    Args:
        network: the raw network F, evaluated in float32 (or as autocast says).
        noise: unit normal (B, C, S, S).
        y: captions (B, L, W) or (B, 1, L, W).
        y_mask: which caption rows are real, bool (B, L), or None for all.
        steps: Heun steps; the last is an Euler step to sigma = 0.
        guidance: 1 is the conditional model alone; larger follows the caption more closely.
        progress: called after each step with (steps done, steps).

    Returns:
        float32 (B, C, S, S), at the scale of the latents in training.

    Raises:
        ValueError: fewer than one step.
    """
    evaluate = guided(network, y.float(), y_mask, guidance)

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        # The state is float64, so that rounding does not pile up; the network is float32.
        denoised = edm.denoise(evaluate, x.float(), sigma.float())
        return (x - denoised.double()) / sigma

    levels = noise_levels(edm, steps, noise.device)
    x = noise.double() * levels[0]
    for step in range(steps):
        sigma, sigma_next = levels[step], levels[step + 1]
        d = slope(x, sigma)
        x_next = x + (sigma_next - sigma) * d
        if step < steps - 1:
            d = (d + slope(x_next, sigma_next)) / 2
            x_next = x + (sigma_next - sigma) * d
        x = x_next
        if progress is not None:
            progress(step + 1, steps)
    return x.float()


def guided(
    network: TextConditioned, y: Tensor, y_mask: Tensor | None, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """F with captions and guidance built in: u + guidance * (c - u), in one doubled batch.

    Guiding F equals guiding D, which is affine in F with the same coefficients for both.
    """
    if guidance == 1:
        text = network.encode_text(y, y_mask)
        return lambda x, c_noise: network(x, c_noise, text)
    # No caption is what caption dropout trains: all rows zero, or a single zero row.
    y = torch.cat((y, torch.zeros_like(y)))
    if y_mask is not None:
        first = torch.zeros_like(y_mask)
        first[:, 0] = True
        y_mask = torch.cat((y_mask, first))
    text = network.encode_text(y, y_mask)

    def evaluate(x: Tensor, c_noise: Tensor) -> Tensor:
        cond, uncond = network(torch.cat((x, x)), c_noise, text).chunk(2)
        return uncond + guidance * (cond - uncond)

    return evaluate

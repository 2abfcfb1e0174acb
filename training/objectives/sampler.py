"""Deterministic sampling with EDM's Heun solver (Karras et al. 2022, arXiv 2206.00364) or Euler's.

Algorithm 1 of the paper, that is algorithm 2 without churn, with classifier-free guidance
(Ho and Salimans 2022, arXiv 2207.12598), for any objective: each says which levels it passes and
what is clean at one of them. No random number is drawn here: the same noise and captions give the
same latents.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from training.objectives.denoiser import Denoiser

Solver = Literal["heun", "euler"]


class TextConditioned(Protocol):
    """A network that reads captions once and is then evaluated many times; see `MicroDiT`."""

    def encode_text(self, y: Tensor, y_mask: Tensor | None = None) -> Any: ...

    def __call__(self, x: Tensor, c_noise: Tensor, y: Any) -> Tensor: ...


@torch.no_grad()
def sample(
    network: TextConditioned,
    denoiser: Denoiser,
    noise: Tensor,
    y: Tensor,
    y_mask: Tensor | None = None,
    steps: int = 30,
    guidance: float = 5.0,
    progress: Callable[[int, int], None] | None = None,
    solver: Solver = "heun",
) -> Tensor:
    """Turn unit noise into latents, with 2 * steps - 1 network evaluations, or Euler's steps.

    Args:
        network: the raw network F, evaluated in float32 (or as autocast says).
        noise: unit normal (B, C, S, S).
        y: captions (B, L, W) or (B, 1, L, W).
        y_mask: which caption rows are real, bool (B, L), or None for all.
        steps: of the solver; the last, to level 0, is an Euler step.
        guidance: 1 is the conditional model alone; larger follows the caption more closely.
        progress: called after each step with (steps done, steps).
        solver: heun (second order, two evaluations a step) or euler (first order, one).

    Returns:
        float32 (B, C, S, S), at the scale of the latents in training.

    Raises:
        ValueError: fewer than one step, or guidance that is no number.
    """
    if steps < 1:
        raise ValueError(f"steps {steps}: must be at least 1")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance {guidance}: must be a finite number")
    evaluate = guided(network, y.float(), y_mask, guidance)

    def slope(x: Tensor, level: Tensor) -> Tensor:
        # The state is float64, so that rounding does not pile up; the network is float32.
        denoised = denoiser.denoise(evaluate, x.float(), level.float())
        return (x - denoised.double()) / level

    levels = denoiser.levels(steps, noise.device)
    x = noise.double() * levels[0]
    for step in range(steps):
        level, level_next = levels[step], levels[step + 1]
        d = slope(x, level)
        x_next = x + (level_next - level) * d
        if solver == "heun" and step < steps - 1:
            d = (d + slope(x_next, level_next)) / 2
            x_next = x + (level_next - level) * d
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

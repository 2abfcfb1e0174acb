"""Muon: momentum whose update is made orthogonal, for matrices; AdamW for the rest, in one object.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); scaled as in Moonlight (Liu et al. 2025,
arXiv 2502.16982). Our own because torch's (from 2.9 on) takes neither stacks of matrices, as
experts are, nor the other parameters, and Composer takes one optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from training.optim.dtensors import parts_as, whole

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that pushes singular values towards 1, steepest at 0; Jordan et al."""


class Group(TypedDict):
    """Parameters that are treated alike; a dict, because that is what torch's optimizers hold."""

    params: list[Parameter]
    kind: Literal["adamw", "muon"]
    lr: float
    lr_factor: float
    """`lr` over the stage's learning rate."""
    weight_decay: float
    matrices: int
    """Muon: how many matrices (out, in) lie one below the other in each parameter, as queries,
    keys and values do; 0 for stacks of matrices (E, in, out), as experts are."""


class Muon(torch.optim.Optimizer):
    """Each group's parameters by its kind; weight decay is decoupled in both.

    Args:
        groups: of which those of kind "muon" hold matrices only.
        betas, eps: AdamW's.
        momentum, nesterov: Muon's.
        scale: "rms" gives an update a root mean square of 0.2, about that of AdamW, whose learning
            rate then suits it (Moonlight, equation 4); "spectral" one of a norm that suits the
            matrix as an operator, sqrt(max(1, out / in)) (Jordan et al.).
    """

    def __init__(
        self,
        groups: list[Group],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: Literal["rms", "spectral"] = "rms",
    ) -> None:
        # fused: also tells torch, where it loads a state, to keep AdamW's step on the device.
        own = {"betas": betas, "eps": eps, "fused": True}
        own |= {"momentum": momentum, "nesterov": nesterov, "scale": scale}
        super().__init__([dict(group) for group in groups], own)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._adamw if group["kind"] == "adamw" else self._muon)(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Parameter]) -> None:
        # As many at a time as there are ranks, each of which orthogonalises one.
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        for first in range(0, len(parameters), ranks):
            some = parameters[first : first + ranks]
            updates = orthogonalise_together([self._update(group, p) for p in some])
            for parameter, update in zip(some, updates, strict=True):
                width_out, width_in = update.shape[-2:]
                if not group["matrices"]:
                    width_out, width_in = width_in, width_out
                if group["scale"] == "rms":
                    scale = 0.2 * max(width_in, width_out) ** 0.5
                else:
                    scale = max(1, width_out / width_in) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = update.view(parameter.shape).to(parameter.dtype)
                parameter.add_(parts_as(update, parameter), alpha=-group["lr"] * scale)

    def _update(self, group: dict[str, Any], parameter: Parameter) -> Tensor:
        """The gradient's running average, as matrices (N, m, n)."""
        state, grad = self.state[parameter], cast(Tensor, parameter.grad)
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        update = state["momentum"].lerp_(grad, 1 - group["momentum"])
        if group["nesterov"]:
            update = grad.lerp(update, group["momentum"])
        update = whole(update)  # a part of a matrix cannot be made orthogonal
        return update.reshape(group["matrices"] or len(update), -1, update.shape[-1])

    def _adamw(self, group: dict[str, Any], parameters: list[Parameter]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            list(parameters),
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise_together(updates: list[Tensor]) -> list[Tensor]:
    """`orthogonalise` for each of no more than one tensor a rank, by that rank; all get all.

    Gradients are the same on all ranks, and so are the results, to the bit.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [orthogonalise(update) for update in updates]
    results = [
        orthogonalise(update)
        if owner == dist.get_rank()
        else torch.empty_like(update, dtype=_precision(update))
        for owner, update in enumerate(updates)
    ]
    sent = [dist.broadcast(r, owner, async_op=True) for owner, r in enumerate(results)]
    for work in sent:
        if work is not None:
            work.wait()
    return results


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices (..., m, n) -> their U V^T, roughly: singular values between about 0.7 and 1.2.

    Each is normalised and orthogonalised for itself, by Newton-Schulz in bfloat16 on GPUs, which
    it was made for, and in float32 elsewhere; float64 stays as it is.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(_precision(matrices))
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the smaller Gram matrix
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT.contiguous() if tall else x


def _precision(matrices: Tensor) -> torch.dtype:
    if matrices.dtype == torch.float64:  # for comparisons
        return torch.float64
    return torch.bfloat16 if matrices.is_cuda else torch.float32

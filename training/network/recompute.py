"""Pieces of a block that keep little for backward: pointwise results are computed there again.

Autograd keeps the operands of every operation, so that of a norm, its modulation and the linear
layer after it three copies of the tokens stay. Here they are one function, which keeps the
normalised tokens alone. No matrix product is done twice. Compiled, the plain formulas run: Dynamo
(torch 2.6) does not trace such functions, and Inductor decides for itself what it keeps.

Shapes as in `training.network.layers`. Under autocast a function's matrices are cast before it and
the rest is done in the precision of what it is given, float32 in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

aten: Any = torch.ops.aten  # a namespace that is filled at run time, as no type checker knows


@dataclass(frozen=True)
class Normed:
    """norm(x) (1 + scale) + shift of tokens x (B, T, d), computed where it is read."""

    x: Tensor
    norm: nn.LayerNorm
    shift: Tensor | None = None
    """(B, 1, d), or None with ``scale``: the norm alone."""
    scale: Tensor | None = None
    """(B, 1, d)."""

    def value(self) -> Tensor:
        """The tokens themselves, (B, T, d)."""
        return self.project()[0]

    def project(self, *matrices: Tensor, parts: int = 1) -> tuple[Tensor, ...]:
        """Their products with ``matrices`` (parts * o, d) transposed, ``parts`` tensors (B, T, o)
        for each; without matrices the tokens themselves."""
        norm, shift, scale = self.norm, self.shift, self.scale
        if _keeps_operands():
            own = (_cast(matrix) for matrix in matrices)
            return _apply(_Project, _wide(self.x), norm.weight, shift, scale, norm.eps, parts, *own)
        h = norm(self.x)
        if scale is not None and shift is not None:
            h = torch.addcmul(shift, h, 1 + scale)
        if not matrices:
            return (h,)
        return tuple(o for matrix in matrices for o in F.linear(h, matrix).chunk(parts, dim=-1))


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension, without a weight. Keeps its result, not ``x``: of
    queries and keys, attention keeps that anyway."""
    if not _keeps_operands():
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return _apply(_UnitNorm, x, eps)


def swiglu(a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """silu(a) b (..., f) times ``matrix`` (d, f) transposed -> (..., d)."""
    if not _keeps_operands():
        return F.linear(F.silu(a) * b, matrix)
    return _apply(_SwiGLU, _cast(a), _cast(b), _cast(matrix))


def gelu_linear(a: Tensor, matrix: Tensor) -> Tensor:
    """gelu(a) (..., f) times ``matrix`` (d, f) transposed -> (..., d)."""
    if not _keeps_operands():
        return F.linear(F.gelu(a), matrix)
    return _apply(_GeluLinear, _cast(a), _cast(matrix))


def experts(x: Tensor, weight: Tensor, rows: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Sum over the experts that chose a token of weight * w2 gelu(w1 x).

    Args:
        x: tokens (N, d).
        weight: (E, k), of each chosen token.
        rows: int64 (E, k), which tokens of x each expert chose.
        w1: (E, d, f).
        w2: (E, f, d).

    Returns:
        (N, d); 0 where no expert chose.
    """
    if not _keeps_operands():
        # Experts first, so that gathering already gives the batched product its layout.
        chosen = x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        y = torch.bmm(F.gelu(torch.bmm(chosen, w1)), w2)
        y = y * weight[..., None].to(y.dtype)
        return y.new_zeros(x.shape).index_add_(0, rows.flatten(), y.flatten(0, 1))
    return _apply(_Experts, _cast(x), weight, rows, _cast(w1), _cast(w2))


def _keeps_operands() -> bool:
    """Whether plain operations would record what they need for backward, each for itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _apply(function: type[Function], *args: Any) -> Any:
    return function.apply(*args)


def _cast(matrix: Tensor) -> Tensor:
    """As autocast gives it to a matrix product."""
    device = matrix.device.type
    if matrix.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return matrix.to(torch.get_autocast_dtype(device))
    return matrix


def _wide(x: Tensor) -> Tensor:
    """As autocast gives it to a norm."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _without_autocast(method: Callable) -> Callable:
    """Backward may be called in an autocast region or outside, and must not depend on it."""

    @functools.wraps(method)
    def plain(ctx: Any, first: Tensor, *others: Any) -> Any:
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return method(ctx, first, *others)
        with torch.autocast(device, enabled=False):
            return method(ctx, first, *others)

    return plain


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / deviation over the last dimension, and 1 / deviation."""
    normed, _, rstd = aten.native_layer_norm(x, x.shape[-1:], None, None, eps)
    return normed, rstd


def _normalise_backward(
    grad: Tensor, normed: Tensor, rstd: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, and of the norm's weight if it has one, from the normalised tokens.

    These are their own normalisation, of mean 0 and deviation 1, and so the same kernel serves; x
    itself is wider by the deviation.
    """
    mean, one = torch.zeros_like(rstd), torch.ones_like(rstd)
    mask = [True, weight is not None, False]
    grad, of_weight, _ = aten.native_layer_norm_backward(
        grad.contiguous(), normed, normed.shape[-1:], mean, one, weight, None, mask
    )
    return grad.mul_(rstd), of_weight


class _Project(Function):
    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        eps: float,
        parts: int,
        *matrices: Tensor,
    ) -> tuple[Tensor, ...]:
        normed, rstd = _normalise(x, eps)
        ctx.save_for_backward(normed, rstd, weight, shift, scale, *matrices)
        ctx.parts = parts
        h = _modulate(normed, _factor(weight, scale), shift)
        if not matrices:
            return (h,)
        flat = _flat(h).to(matrices[0].dtype)
        # A product for each part: a part of one tensor would keep all of that.
        own = _parts(matrices, parts)
        return tuple((flat @ part.t()).view(*x.shape[:-1], -1) for part in own)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, *grads: Tensor) -> Any:
        normed, rstd, weight, shift, scale, *matrices = ctx.saved_tensors
        factor, (grad, *_) = _factor(weight, scale), grads
        of_matrices = [torch.empty_like(matrix) for matrix in matrices]
        if matrices:
            flat = _flat(_modulate(normed, factor, shift)).to(matrices[0].dtype)
            own = [_flat(part) for part in grads]
            _products_with(own, flat, _parts(of_matrices, ctx.parts))
            grad = _sum_of_products(own, _parts(matrices, ctx.parts))
            grad = grad.view(normed.shape).to(normed.dtype)
        if scale is None:  # the kernel multiplies by the weight and finds its gradient
            of_x, of_weight = _normalise_backward(grad, normed, rstd, weight)
            return of_x, of_weight, None, None, None, None, *of_matrices
        of_shift = grad.sum(1, keepdim=True)
        of_factor = (grad * normed).sum(1, keepdim=True)
        of_scale = of_factor * weight
        of_weight = (of_factor * (1 + scale)).sum((0, 1))
        grad = grad.mul_(factor) if matrices else grad * factor  # without, it is not ours
        of_x, _ = _normalise_backward(grad, normed, rstd)
        return of_x, of_weight, of_shift, of_scale, None, None, *of_matrices


def _parts(matrices: Sequence[Tensor], parts: int) -> list[Tensor]:
    return [part for matrix in matrices for part in matrix.chunk(parts)]


def _products_with(grads: Sequence[Tensor], x: Tensor, into: Sequence[Tensor]) -> None:
    """The gradients (o, d) of matrices, from those (N, o) of their products with x (N, d)."""
    for grad, part in zip(grads, into, strict=True):
        torch.mm(grad.t(), x, out=part)


def _sum_of_products(grads: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
    """The gradient (N, d) of x, from those (N, o) of its products with ``matrices`` (o, d)."""
    total = grads[0] @ matrices[0]
    for grad, matrix in zip(grads[1:], matrices[1:], strict=True):
        total.addmm_(grad, matrix)
    return total


def _factor(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The norm's weight and the modulation in one: (B, 1, d), or (d,) without modulation."""
    return weight if scale is None else weight * (1 + scale)


def _modulate(normed: Tensor, factor: Tensor, shift: Tensor | None) -> Tensor:
    return normed * factor if shift is None else torch.addcmul(shift, normed, factor)


class _UnitNorm(Function):
    @staticmethod
    @_without_autocast
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        normed, rstd = _normalise(_wide(x), eps)
        normed = normed.to(x.dtype)
        ctx.save_for_backward(normed, rstd)
        return normed

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        normed, rstd = ctx.saved_tensors
        return _normalise_backward(_wide(grad), _wide(normed), rstd)[0], None


class _SwiGLU(Function):
    @staticmethod
    @_without_autocast
    def forward(ctx: Any, a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, matrix)
        return F.linear(F.silu(a).mul_(b), matrix)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b, matrix = ctx.saved_tensors
        opened = F.silu(a)
        of_matrix = _flat(grad).t() @ _flat(opened * b)
        of_b = grad @ matrix
        of_a = of_b * b
        aten.silu_backward.grad_input(of_a, a, grad_input=of_a)
        return of_a, of_b.mul_(opened), of_matrix


class _GeluLinear(Function):
    @staticmethod
    @_without_autocast
    def forward(ctx: Any, a: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(a, matrix)
        return F.linear(F.gelu(a), matrix)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, matrix = ctx.saved_tensors
        of_matrix = _flat(grad).t() @ _flat(F.gelu(a))
        of_a = grad @ matrix
        aten.gelu_backward.grad_input(of_a, a, grad_input=of_a)
        return of_a, of_matrix


class _Experts(Function):
    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, w1: Tensor, w2: Tensor
    ) -> Tensor:
        chosen = x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        hidden = torch.bmm(chosen, w1)
        ctx.save_for_backward(x, weight, rows, w1, w2, hidden)
        y = torch.bmm(F.gelu(hidden), w2)
        y.mul_(weight[..., None])
        return y.new_zeros(x.shape).index_add_(0, rows.flatten(), y.flatten(0, 1))

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, rows, w1, w2, hidden = ctx.saved_tensors
        flat, weight = rows.flatten(), weight[..., None].to(w2.dtype)
        opened = F.gelu(hidden)
        own = grad.index_select(0, flat).unflatten(0, rows.shape)
        # <grad, w2 h> = <w2' grad, h>: the weights' gradient needs no outputs of the experts.
        of_hidden = torch.bmm(own, w2.transpose(1, 2))
        of_weight = (of_hidden * opened).sum(-1)
        of_w2 = torch.bmm(opened.transpose(1, 2), own.mul_(weight))
        of_hidden.mul_(weight)
        aten.gelu_backward.grad_input(of_hidden, hidden, grad_input=of_hidden)
        chosen = x.index_select(0, flat).unflatten(0, rows.shape)
        of_w1 = torch.bmm(chosen.transpose(1, 2), of_hidden)
        of_chosen = torch.bmm(of_hidden, w1.transpose(1, 2))
        of_x = torch.zeros_like(x).index_add_(0, flat, of_chosen.flatten(0, 1))
        return of_x, of_weight, None, of_w1, of_w2

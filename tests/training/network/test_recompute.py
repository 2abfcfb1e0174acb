"""What keeps less for backward has the outputs and gradients of the plain formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import gradcheck

from tests.training.helpers.networks import SMALL
from training.network import recompute
from training.network.blocks import DiTBlock
from training.network.config import BlockShape
from training.network.moe import ExpertChoiceMLP
from training.network.recompute import Normed, experts, gelu_linear, swiglu, unit_norm

EPS = 1e-6
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def norm(weight: Tensor) -> nn.LayerNorm:
    layer = nn.LayerNorm(weight.shape[0], eps=EPS, bias=False)
    del layer.weight
    layer.weight = weight  # pyright: ignore[reportAttributeAccessIssue]  # not a leaf: checked too
    return layer


def modulated(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, *m: Tensor):
    return Normed(x, norm(weight), shift, scale).project(*m, parts=3)


def normed(x: Tensor, weight: Tensor, *m: Tensor):
    return Normed(x, norm(weight)).project(*m)


ROWS = torch.tensor([[0, 3, 4], [3, 1, 5]])  # of 6 tokens: 3 twice, 2 never
X, WEIGHT = numbers(2, 3, 4), 1 + numbers(4) / 4
SHIFT, SCALE = numbers(2, 1, 4), numbers(2, 1, 4, seed=1)
CASES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "modulated": (modulated, (X, WEIGHT, SHIFT, SCALE, numbers(6, 4), numbers(9, 4))),
    "modulated value": (modulated, (X, WEIGHT, SHIFT, SCALE)),
    "normed": (normed, (X, WEIGHT, numbers(5, 4), numbers(2, 4))),
    "normed value": (normed, (X, WEIGHT)),
    "unit norm": (lambda x: unit_norm(x, EPS), (X,)),
    "swiglu": (swiglu, (numbers(2, 3, 5), numbers(2, 3, 5, seed=1), numbers(4, 5))),
    "gelu": (gelu_linear, (numbers(2, 3, 5), numbers(4, 5))),
    "experts": (
        lambda x, weight, w1, w2: experts(x, weight, ROWS, w1, w2),
        (numbers(6, 4), numbers(2, 3).sigmoid(), numbers(2, 4, 5), numbers(2, 5, 4)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_small_differences(name: str) -> None:
    function, values = CASES[name]
    leaves = [value.clone().requires_grad_() for value in values]
    assert gradcheck(function, leaves)


def run(function: Function, values: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs and gradients; backward goes through tensors that are not contiguous."""
    leaves = [value.detach().clone().requires_grad_() for value in values]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    total = sum(
        (part.transpose(0, -1).to(values[0]) * (1 + i)).sin().sum() for i, part in enumerate(out)
    )
    assert isinstance(total, Tensor)
    return [*out, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_formulas(
    name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, values = CASES[name]
    if autocast:
        values = tuple(value.float() for value in values)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = run(function, values)
        monkeypatch.setattr(recompute, "_keeps_operands", lambda: False)
        expected = run(function, values)
    for a, b in zip(actual, expected, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < (0.02 if autocast else 1e-13)


def test_backward_outside_the_autocast_region_is_the_same() -> None:
    function, values = CASES["modulated"]
    grads = []
    for inside in (True, False):
        leaves = [value.float().requires_grad_() for value in values]
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.cat(list(function(*leaves)), dim=-1)
            assert out.dtype == torch.bfloat16
            if inside:
                out.sum().backward()
        if not inside:
            out.sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        assert torch.equal(a, b)


def kept(block: DiTBlock, *inputs: Tensor | None) -> int:
    """Numbers that backward keeps, weights apart; each storage counts once, and in whole."""
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    found: dict[int, Tensor] = {}  # holds them, or another would get the address

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        block(*inputs)
    return sum(x.untyped_storage().nbytes() for x in found.values()) // 4


@pytest.mark.parametrize("count", [0, 4])
def test_a_block_keeps_what_is_counted_by_hand(count: int) -> None:
    """A token of width d, attention width A, hidden width F: its three normalised forms, queries,
    keys, values and result of the attention, queries and result of the one to the caption, what
    the two gates multiply; and a and b of SwiGLU, or the routed token and the experts' hidden."""
    config = dataclasses.replace(SMALL, width=64, head_dim=16, num_experts=4)
    width, attn_width, hidden, tokens = 64, 32, 96, 512
    block = DiTBlock(BlockShape(width, attn_width, hidden, count), config)
    x = torch.randn(1, tokens, width, requires_grad=True)
    found = kept(block, x, torch.randn(1, 64), torch.randn(1, 1, width), None)
    a_token = (3 + 2 + 2) * width + 4 * attn_width
    # Twice as many rows as tokens are chosen. Scores, choices, statistics: a few dozen.
    a_token += width + 2 * hidden if count else 2 * hidden
    assert tokens * a_token <= found < tokens * (a_token + 48)


def test_unused_expert_keeps_its_gradient_zero() -> None:
    """An expert whose tokens all have weight 0 learns nothing, and nothing is divided by it."""
    moe = ExpertChoiceMLP(4, 6, 2, 1.0)
    moe.initialise(0.02, torch.Generator().manual_seed(0))
    with torch.no_grad():
        moe.gate.weight.copy_(torch.tensor([[1e4], [-1e4]]).expand(2, 4))
    x = torch.ones(1, 4, 4) + torch.arange(4.0)
    h = Normed(x, nn.LayerNorm(4, bias=False), torch.full((1, 1, 4), 5.0), torch.zeros(1, 1, 4))
    moe(h).sum().backward()
    assert moe.w1.grad is not None
    assert torch.isfinite(moe.w1.grad).all()
    assert moe.w1.grad[0].abs().max() > 0
    assert moe.w1.grad[1].abs().max() == 0

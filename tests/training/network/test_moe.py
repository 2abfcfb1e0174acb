"""Expert choice equals its definition by one-hot products."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.network.moe import ExpertChoiceMLP, tokens_per_expert
from training.network.recompute import Normed


def oracle(moe: ExpertChoiceMLP, x: Tensor, k: int) -> Tensor:
    """Equations of arXiv 2202.09368 §3.2 with the permutation matrix P written out."""
    scores = torch.softmax(x @ moe.gate.weight.T, dim=-1)  # (B, T, E)
    gates, chosen = torch.topk(scores.transpose(1, 2), k)  # (B, E, k)
    permutation = F.one_hot(chosen, x.shape[1]).to(x.dtype)  # (B, E, k, T)
    tokens = torch.einsum("bekt,btd->bekd", permutation, x)
    hidden = F.gelu(torch.einsum("bekd,edf->bekf", tokens, moe.w1))
    out = torch.einsum("bekf,efd->bekd", hidden, moe.w2)
    return torch.einsum("bekt,bek,bekd->btd", permutation, gates, out)


def layer(num_experts: int, capacity: float) -> ExpertChoiceMLP:
    moe = ExpertChoiceMLP(width=8, hidden=12, num_experts=num_experts, capacity=capacity).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(generator=generator)
    return moe


NORM = torch.nn.LayerNorm(8, bias=False)


def routed(moe: ExpertChoiceMLP, x: Tensor) -> Tensor:
    return moe(Normed(x, NORM.to(x.dtype)))


def tokens(batch: int = 3, count: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, count, 8, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("num_experts", "capacity", "k"),
    [(4, 2.0, 8), (8, 2.0, 4), (5, 1.3, 4), (4, 4.0, 16), (8, 0.3, 1)],  # 4 = floor(4.16)
)
def test_output_and_gradients_equal_the_one_hot_form(
    num_experts: int, capacity: float, k: int
) -> None:
    moe = layer(num_experts, capacity)
    x = tokens().requires_grad_()
    inputs = (x, *moe.parameters())
    out, expected = routed(moe, x), oracle(moe, NORM(x), k)
    torch.testing.assert_close(out, expected)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    actual = torch.autograd.grad(out, inputs, direction)
    wanted = torch.autograd.grad(expected, inputs, direction)
    torch.testing.assert_close(actual, wanted)


def test_samples_do_not_compete_for_experts() -> None:
    moe, x = layer(4, 1.0), tokens()
    torch.testing.assert_close(routed(moe, x)[1:2], routed(moe, x[1:2]))


def test_tokens_that_nobody_chooses_get_zero() -> None:
    moe, x = layer(4, 0.25), tokens()  # 4 experts choose 1 token each: at least 12 of 16 unchosen
    assert ((routed(moe, x) == 0).all(dim=-1).sum(dim=1) >= 12).all()


def test_two_runs_are_bitwise_equal() -> None:
    moe = layer(4, 2.0).float()
    x = tokens(count=64).float()

    def run() -> list[Tensor]:
        moe.zero_grad()
        out = routed(moe, x)
        out.square().sum().backward()
        return [out, *(p.grad for p in moe.parameters() if p.grad is not None)]

    first, second = run(), run()
    assert len(first) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("count", "experts", "capacity", "k"),
    [(256, 8, 2.0, 64), (64, 8, 2.0, 16), (25, 8, 2.0, 6), (3, 8, 2.0, 1), (10, 4, 1.5, 3)],
)
def test_capacity_is_rounded_down_but_never_to_zero(
    count: int, experts: int, capacity: float, k: int
) -> None:
    assert tokens_per_expert(count, experts, capacity) == k

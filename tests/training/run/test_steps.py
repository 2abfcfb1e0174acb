"""The parts of a training step: random numbers, dropped captions, learning rate, loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from training.config.stage_settings import StageSettings
from training.masking.deferred import Deferred
from training.model import DiffusionModel, Objective, drop_captions
from training.network.config import DiTConfig
from training.network.dit import MicroDiT
from training.objectives.edm import EDM
from training.optim.optimizers import learning_rate
from training.randomness import Rows, draw, keyed_seed

CPU = torch.device("cpu")


def stage(**changes: object) -> StageSettings:
    return StageSettings.model_validate(
        {"steps": 100, "resolution": 64, "batch_size": 8, "lr": 1.0} | changes
    )


def test_draws_do_not_depend_on_ranks_or_the_global_generator() -> None:
    def numbers(rows: Rows):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        draws = draw((3, "masked", 17), 8, (4, 6, 6), 9, rows, CPU)
        assert torch.equal(before, torch.get_rng_state())
        return draws

    whole = numbers(Rows())
    assert whole.noise.shape == (8, 4, 6, 6)
    assert whole.mask.shape == (8, 9)
    for rank in range(2):
        part = numbers(Rows(first=rank, step=2))
        for name in ("noise", "level", "mask"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rank::2])


def test_draws_differ_by_every_part_of_the_key() -> None:
    keys = [(3, "masked", 17), (4, "masked", 17), (3, "full", 17), (3, "masked", 18)]
    levels = {draw(key, 2, (1, 2, 2), 1, Rows(), CPU).level[0].item() for key in keys}
    assert len(levels) == 4
    assert len({keyed_seed("a", step) for step in range(1000)}) == 1000


def test_dropped_captions_are_what_the_sampler_calls_unconditional() -> None:
    y = torch.ones(2, 3, 4)
    y_mask = torch.tensor([[True, True, False], [True, True, True]])
    before = y.clone()
    dropped, mask = drop_captions(y, y_mask, torch.tensor([True, False]))
    assert torch.equal(y, before)  # the loader's buffer is not written to
    assert mask is not None
    assert not dropped[0].any()
    assert torch.equal(dropped[1], y[1])
    assert mask.tolist() == [[True, False, False], [True, True, True]]
    full, none = drop_captions(y, None, torch.tensor([False, True]))
    assert none is None
    assert full.sum(dim=(1, 2)).tolist() == [12, 0]


def test_learning_rate_of_the_papers_first_stage() -> None:
    """Warm-up 2,500 and cosine to 0.33: a + (1 - a)(1 + cos(pi u))/2 (facts/method.md, 3.1)."""
    paper = stage(steps=250_000, lr=2.4e-4, schedule="cosine", warmup=2_500, final_lr=0.33)
    assert learning_rate(paper, 0) == pytest.approx(2.4e-4 / 2_500)
    assert learning_rate(paper, 2_499) == pytest.approx(2.4e-4)
    assert learning_rate(paper, 2_500) == 2.4e-4
    u = (126_250 - 2_500) / 247_500
    expected = 2.4e-4 * (0.33 + 0.67 * (1 + math.cos(math.pi * u)) / 2)
    assert learning_rate(paper, 126_250) == pytest.approx(expected)
    assert learning_rate(paper, 250_000) == pytest.approx(7.92e-5)


def test_constant_rate_after_warm_up() -> None:
    rates = [learning_rate(stage(warmup=4), step) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def network() -> MicroDiT:
    sizes: dict[str, Any] = {
        "width": 32,
        "depth": 2,
        "head_dim": 16,
        "multiple_of": 16,
        "num_experts": 2,
    }
    config = DiTConfig(**sizes, input_size=8, mixer_width=32, mixer_depth=1, caption_width=16)
    network = MicroDiT(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # at initialisation F is 0 and says nothing
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def batch_of(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(size, 4, 8, 8, generator=generator),
        "y": torch.randn(size, 5, 16, generator=generator).half(),
        "y_mask": torch.arange(5) < torch.arange(1, size + 1).clamp(max=5)[:, None],
        "drop": torch.rand(size, generator=generator),
        "index": torch.arange(size),
    }


def model_of(network: MicroDiT, **changes: object) -> DiffusionModel:
    settings = {
        "denoiser": EDM(),
        "mask": Deferred(),
        "mask_ratio": 0.5,
        "caption_drop": 0.5,
        "seed": 0,
        "stage": "s",
        "batch_size": 8,
        "rows": Rows(),
    }
    return DiffusionModel(network, Objective(**settings | changes))  # pyright: ignore


def test_loss_is_a_function_of_the_step(network: MicroDiT) -> None:
    model, batch = model_of(network), batch_of(8)
    before = {name: value.clone() for name, value in batch.items()}
    first = model(batch)
    assert first.shape == (8,)
    assert torch.equal(first, model(batch))
    model.step = 1
    assert not torch.equal(first, model(batch))
    model.step = 0
    assert torch.equal(first, model(batch))
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_loss_does_not_depend_on_micro_batches_or_ranks(network: MicroDiT) -> None:
    batch = batch_of(8)
    whole = model_of(network)(batch)
    parts = [model_of(network)({k: v[i : i + 2] for k, v in batch.items()}) for i in range(0, 8, 2)]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-5)
    for rank in range(2):
        mine = {k: v[rank::2] for k, v in batch.items()} | {"index": torch.arange(4)}
        share = model_of(network, rows=Rows(rank, 2))(mine)
        assert torch.allclose(share, whole[rank::2], rtol=1e-5)


def test_flops_of_a_batch(network: MicroDiT) -> None:
    from training.flops import flops_per_image

    flops = model_of(network).flops_per_batch(batch_of(8))
    assert flops == 3 * 8 * flops_per_image(network.config, 0.5, 5)

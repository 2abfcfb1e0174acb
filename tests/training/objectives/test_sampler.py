"""The sampler solves an ODE with a known solution and conditions as training did."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.network.config import DiTConfig
from training.network.dit import MicroDiT
from training.objectives.edm import EDM
from training.objectives.sampler import sample

NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 1, 5, 24, generator=torch.Generator().manual_seed(1))


@dataclass
class Stub:
    """F = mean of the caption: no function of x, so that the ODE stays solvable by hand."""

    encoded: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def encode_text(self, y: Tensor, y_mask: Tensor | None = None) -> Tensor:
        self.encoded.append((y, y_mask))
        return y.flatten(1).mean(dim=1)

    def __call__(self, x: Tensor, c_noise: Tensor, y: Any) -> Tensor:
        assert x.dtype == c_noise.dtype == torch.float32
        self.batches.append(x.shape[0])
        return y.view(-1, 1, 1, 1).expand_as(x)


def model() -> MicroDiT:
    config = DiTConfig(
        input_size=8,
        width=32,
        depth=2,
        head_dim=8,
        multiple_of=16,
        mixer_width=16,
        mixer_depth=1,
        moe_every=0,  # experts choose by rank, which a rounding error can change
        caption_width=24,
    )
    network = MicroDiT(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return network


def test_noise_levels() -> None:
    levels = EDM(sigma_min=0.002, sigma_max=80.0).levels(30)
    i = np.arange(30)
    a, b = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
    expected = np.append((a + i / 29 * (b - a)) ** 7, 0.0)
    assert levels.dtype == torch.float64
    np.testing.assert_allclose(levels.numpy(), expected, rtol=1e-12)


def test_solves_the_probability_flow_of_a_gaussian_to_second_order() -> None:
    # Data N(0, sigma_data^2) have the optimal F = 0; then x grows as sqrt(sigma^2 + sigma_data^2).
    edm = EDM()
    exact = NOISE.double() * edm.sigma_max * edm.sigma_data
    exact = exact / (edm.sigma_max**2 + edm.sigma_data**2) ** 0.5

    def error(steps: int) -> float:
        latents = sample(Stub(), edm, NOISE, torch.zeros_like(Y), steps=steps, guidance=1)
        return ((latents - exact).abs().max() / exact.abs().max()).item()

    assert error(200) < 5e-4
    assert 3.5 < error(20) / error(40) < 5.0


def test_evaluations_and_progress() -> None:
    network, calls = Stub(), []
    sample(network, EDM(), NOISE, Y, steps=5, progress=lambda done, steps: calls.append(done))
    assert network.batches == [4] * 9  # 2 * steps - 1, conditional and unconditional together
    assert calls == [1, 2, 3, 4, 5]
    assert len(network.encoded) == 1  # captions are read once


def test_guidance_one_evaluates_the_conditional_model_alone() -> None:
    network = Stub()
    sample(network, EDM(), NOISE, Y, steps=2, guidance=1)
    assert network.batches == [2] * 3
    assert torch.equal(network.encoded[0][0], Y)


def test_guidance_zero_ignores_the_caption() -> None:
    with_caption = sample(Stub(), EDM(), NOISE, Y, steps=4, guidance=0)
    without = sample(Stub(), EDM(), NOISE, torch.zeros_like(Y), steps=4, guidance=1)
    assert torch.equal(with_caption, without)


def test_guidance_extrapolates() -> None:
    # F is the caption's mean, so guidance w equals a caption w times as strong.
    guided = sample(Stub(), EDM(), NOISE, Y, steps=4, guidance=2.5)
    scaled = sample(Stub(), EDM(), NOISE, 2.5 * Y, steps=4, guidance=1)
    torch.testing.assert_close(guided, scaled)


def test_no_caption_is_zero_rows_in_full_mode_and_one_zero_row_in_trimmed_mode() -> None:
    network = Stub()
    sample(network, EDM(), NOISE, Y, steps=1)
    y, y_mask = network.encoded[0]
    assert y_mask is None
    assert torch.equal(y[:2], Y)
    assert y[2:].abs().max() == 0
    real = torch.arange(5) < torch.tensor([[5], [2]])
    sample(network, EDM(), NOISE, Y, real, steps=1)
    y, y_mask = network.encoded[1]
    assert y_mask is not None
    assert torch.equal(y_mask[:2], real)
    assert y[2:].abs().max() == 0
    assert y_mask[2:].tolist() == [[True, False, False, False, False]] * 2


def test_padding_does_not_change_trimmed_captions() -> None:
    network, real = model(), torch.arange(5) < torch.tensor([[5], [2]])
    expected = sample(network, EDM(), NOISE, Y, real, steps=4)
    padded = torch.cat((Y, torch.ones(2, 1, 6, 24)), dim=2)
    longer = torch.cat((real, torch.zeros(2, 6, dtype=torch.bool)), dim=1)
    actual = sample(network, EDM(), NOISE, padded, longer, steps=4)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_picture_depends_on_its_noise_and_caption_alone() -> None:
    network = model()
    state = torch.get_rng_state()
    together = sample(network, EDM(), NOISE, Y, steps=4)
    assert torch.equal(torch.get_rng_state(), state)
    alone = sample(network, EDM(), NOISE[1:], Y[1:], steps=4)
    assert not together.requires_grad
    assert together.dtype == torch.float32
    assert (together[1:] - alone).abs().max() < 1e-5 * alone.abs().max()


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(ValueError, match="steps 0"):
        sample(Stub(), EDM(), NOISE, Y, steps=0)
    with pytest.raises(ValueError, match="guidance nan"):
        sample(Stub(), EDM(), NOISE, Y, guidance=float("nan"))

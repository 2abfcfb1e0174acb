"""Preconditioning and loss follow EDM; only kept patches are counted."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from training.masking.deferred import Deferred
from training.objectives.edm import EDM

GENERATOR = torch.Generator().manual_seed(0)
LATENTS = torch.randn(3, 4, 8, 8, generator=GENERATOR)
EPS = torch.randn(3, 4, 8, 8, generator=GENERATOR)
SIGMA = torch.tensor([0.05, 0.9, 20.0])
Y = torch.randn(3, 5, 6, generator=GENERATOR)


class Recorder:
    """A network that remembers what it was given and returns fixed numbers."""

    def __init__(self, output: Tensor) -> None:
        self.output = output
        self.seen: dict[str, Any] = {}

    def __call__(self, x: Tensor, c_noise: Tensor, **conditions: Any) -> Tensor:
        self.seen = {"x": x, "c_noise": c_noise, **conditions}
        return self.output


def test_preconditioning() -> None:
    output = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    network = Recorder(output)
    denoised = EDM(sigma_data=0.5).denoise(network, LATENTS, SIGMA, y=Y)
    assert network.seen["y"] is Y
    for i, sigma in enumerate(SIGMA.tolist()):  # EDM, Table 1, right column
        c_skip = 0.25 / (sigma**2 + 0.25)
        c_out = sigma * 0.5 / math.sqrt(0.25 + sigma**2)
        c_in = 1 / math.sqrt(sigma**2 + 0.25)
        torch.testing.assert_close(network.seen["x"][i], c_in * LATENTS[i])
        assert network.seen["c_noise"][i].item() == pytest.approx(math.log(sigma) / 4)
        torch.testing.assert_close(denoised[i], c_skip * LATENTS[i] + c_out * output[i])


def test_one_noise_level_serves_a_batch() -> None:
    network = Recorder(torch.ones(3, 4, 8, 8))
    one = EDM().denoise(network, LATENTS, torch.tensor(0.7))
    assert network.seen["c_noise"].shape == (1,)
    torch.testing.assert_close(one, EDM().denoise(network, LATENTS, torch.full((3,), 0.7)))


def test_input_and_target_have_unit_variance_at_every_noise_level() -> None:
    edm = EDM(sigma_data=0.9)
    generator = torch.Generator().manual_seed(2)
    latents = 0.9 * torch.randn(3, 4, 64, 64, generator=generator)
    eps = torch.randn(3, 4, 64, 64, generator=generator)
    network = Recorder(torch.zeros_like(latents))
    # F = 0, so the weighted error is the squared target of F, whose variance must be 1.
    loss = edm.loss(network, latents, SIGMA, eps, Y)
    torch.testing.assert_close(loss, torch.ones(3), rtol=0.05, atol=0)
    torch.testing.assert_close(
        network.seen["x"].std(dim=(1, 2, 3)), torch.ones(3), rtol=0.05, atol=0
    )


def test_loss_is_the_weighted_error_of_each_sample() -> None:
    edm = EDM()
    network = Recorder(torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3)))
    loss = edm.loss(network, LATENTS, SIGMA.view(3, 1, 1, 1), EPS, Y)
    for i, sigma in enumerate(SIGMA.tolist()):
        noisy = LATENTS[i : i + 1] + sigma * EPS[i : i + 1]
        only = Recorder(network.output[i : i + 1])
        error = (edm.denoise(only, noisy, SIGMA[i]) - LATENTS[i : i + 1]) ** 2
        weight = (sigma**2 + 0.81) / (0.9 * sigma) ** 2
        torch.testing.assert_close(loss[i], weight * error.mean())


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_masked_loss_counts_kept_patches_only(patch: int) -> None:
    edm, grid = EDM(), 8 // patch
    mask = Deferred().draw(
        torch.rand(3, grid * grid, generator=torch.Generator().manual_seed(4)), 0.5
    )
    assert mask is not None
    dropped = mask.mask.view(3, 1, grid, 1, grid, 1).expand(3, 4, grid, patch, grid, patch)
    dropped = dropped.reshape(3, 4, 8, 8).bool()
    output = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def loss(prediction: Tensor) -> Tensor:
        return edm.loss(Recorder(prediction), LATENTS, SIGMA, EPS, Y, mask=mask)

    expected = loss(output)
    assert torch.equal(loss(torch.where(dropped, output + 100, output)), expected)
    assert (loss(torch.where(dropped, output, output + 1)) != expected).all()
    # Same scale as unmasked: a mean over the kept values.
    noisy = LATENTS + SIGMA.view(3, 1, 1, 1) * EPS
    error = (edm.denoise(Recorder(output), noisy, SIGMA) - LATENTS) ** 2
    weight = (SIGMA**2 + 0.81) / (0.9 * SIGMA) ** 2
    by_hand = torch.stack([error[i][~dropped[i]].mean() for i in range(3)]) * weight
    torch.testing.assert_close(expected, by_hand)


def test_conditions_reach_the_network() -> None:
    mask = Deferred().draw(torch.rand(3, 16, generator=torch.Generator().manual_seed(4)), 0.5)
    y_mask = torch.ones(3, 5, dtype=torch.bool)
    network = Recorder(torch.zeros_like(LATENTS))
    EDM().loss(network, LATENTS, SIGMA, EPS, Y, y_mask, mask)
    assert network.seen["mask"] is mask
    assert network.seen["y_mask"] is y_mask


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_precision(stored: torch.dtype, computed: torch.dtype) -> None:
    network = Recorder(torch.zeros(3, 4, 8, 8, dtype=torch.bfloat16))
    loss = EDM().loss(network, LATENTS.to(stored), SIGMA, EPS, Y.to(stored))
    assert loss.dtype == network.seen["x"].dtype == network.seen["y"].dtype == computed


def test_training_noise_levels_are_log_normal() -> None:
    normal = torch.tensor([-1.0, 0.0, 2.0])
    expected = [math.exp(-0.6), 1.0, math.exp(1.2)]
    assert EDM(p_mean=0.0, p_std=0.6).level(normal).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "change", [{"sigma_data": 0.0}, {"sigma_min": 0.0}, {"p_std": -1.0}, {"sigma_max": 0.001}]
)
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        EDM(**change)

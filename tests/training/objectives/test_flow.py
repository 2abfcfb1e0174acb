"""Rectified flow: loss, levels and sampler against formulas written out."""

import numpy as np
import pytest
import torch
from torch import Tensor

from training.masking.deferred import Deferred
from training.objectives.flow import Flow
from training.objectives.sampler import sample

GENERATOR = torch.Generator().manual_seed(0)
LATENTS = torch.randn(3, 4, 8, 8, generator=GENERATOR)
EPS = torch.randn(3, 4, 8, 8, generator=GENERATOR)
T = torch.tensor([0.02, 0.5, 0.97])
Y = torch.randn(3, 5, 6, generator=GENERATOR)
OUTPUT = torch.randn(3, 4, 8, 8, generator=GENERATOR)


class Recorder:
    """A network that remembers what it was given and returns fixed numbers."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, c_noise: Tensor, **conditions: Tensor) -> Tensor:
        self.seen = {"x": x, "c_noise": c_noise, **conditions}
        return OUTPUT


def numpy_loss(patch: int, mask: np.ndarray | None) -> np.ndarray:
    """Arrays of float64; `mask` (B, T) is 1 where a patch was dropped."""
    x, eps, v, t = (a.double().numpy() for a in (LATENTS, EPS, OUTPUT, T))
    noisy = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * eps
    velocity = eps - x
    assert np.allclose(noisy + (1 - t)[:, None, None, None] * velocity, eps)  # a straight line
    error = (v - velocity) ** 2
    if mask is None:
        return error.mean(axis=(1, 2, 3))
    grid = 8 // patch
    kept = 1 - mask.reshape(3, 1, grid, 1, grid, 1)
    kept = np.broadcast_to(kept, (3, 4, grid, patch, grid, patch)).reshape(3, 4, 8, 8)
    return (error * kept).sum(axis=(1, 2, 3)) / kept.sum(axis=(1, 2, 3))


@pytest.mark.parametrize("patch", [None, 1, 2, 4])
def test_loss_is_the_error_of_the_velocity(patch: int | None) -> None:
    mask, network = None, Recorder()
    if patch is not None:
        mask = Deferred().draw(torch.rand(3, (8 // patch) ** 2, generator=GENERATOR), 0.5)
        assert mask is not None
    loss = Flow().loss(network, LATENTS, T.view(3, 1, 1, 1), EPS, Y, mask=mask)
    expected = numpy_loss(patch or 1, None if mask is None else mask.mask.double().numpy())
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-5)
    t = T.view(3, 1, 1, 1)
    torch.testing.assert_close(network.seen["x"], (1 - t) * LATENTS + t * EPS)
    torch.testing.assert_close(network.seen["c_noise"], 1000 * T)
    assert network.seen["mask"] is mask
    assert network.seen["y_mask"] is None


def test_denoising_runs_the_velocity_back() -> None:
    t = T.view(3, 1, 1, 1)
    denoised = Flow().denoise(Recorder(), LATENTS, T, y=Y)
    torch.testing.assert_close(denoised, LATENTS - t * OUTPUT)
    torch.testing.assert_close((LATENTS - denoised) / t, OUTPUT)  # the sampler's slope


def test_levels_in_training_are_logit_normal() -> None:
    normal = torch.linspace(-3, 3, 7, dtype=torch.float64)
    level = Flow(logit_mean=0.5, logit_std=2.0).level(normal).numpy()
    np.testing.assert_allclose(np.log(level / (1 - level)), 0.5 + 2.0 * normal.numpy(), rtol=1e-9)
    assert Flow().level(torch.zeros(1)).item() == 0.5


def test_shift_makes_the_same_picture_equally_visible() -> None:
    # n noisy values of one number tell it with a standard error of t / (1 - t) / sqrt(n).
    plain, shifted = Flow(), Flow(shift=2.0)
    for a, b in (
        (plain.level(torch.linspace(-3, 3, 7)), shifted.level(torch.linspace(-3, 3, 7))),
        (plain.levels(10)[1:-1], shifted.levels(10)[1:-1]),
    ):
        torch.testing.assert_close(b / (1 - b), 2 * a / (1 - a), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_runs_from_noise_to_clean(shift: float) -> None:
    levels = Flow(shift=shift).levels(4)
    assert levels.dtype == torch.float64
    assert (levels[0].item(), levels[-1].item()) == (1.0, 0.0)
    assert (levels.diff() < 0).all()
    if shift == 1:
        assert levels.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


class Gaussian:
    """The best velocity for latents N(mean, std^2), mean being that of the caption."""

    std = 0.6

    def encode_text(self, y: Tensor, y_mask: Tensor | None = None) -> Tensor:
        return y.flatten(1).mean(dim=1).view(-1, 1, 1, 1)

    def __call__(self, x: Tensor, c_noise: Tensor, y: Tensor) -> Tensor:
        t = (c_noise.double() / 1000).view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        away = (x - (1 - t) * y) / variance
        expected_latent = y + (1 - t) * self.std**2 * away
        return (t * away - expected_latent).float()  # E[eps] - E[x], given the noisy latent


NOISE = torch.randn(3, 4, 8, 8, generator=GENERATOR)


def error(steps: int, flow: Flow, **options: str) -> float:
    """Of the sampler: noise z has to become mean + std z, the transport of one Gaussian into the
    other along the flow."""
    found = sample(Gaussian(), flow, NOISE, Y, steps=steps, guidance=1, **options)  # pyright: ignore
    mean = Y.flatten(1).mean(dim=1).view(-1, 1, 1, 1)
    return (found - (mean + Gaussian.std * NOISE)).abs().max().item()


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_recovers_a_gaussian_exactly(shift: float) -> None:
    flow = Flow(shift=shift)
    assert error(400, flow) < 1e-4
    assert 3.2 < error(40, flow) / error(80, flow) < 5  # second order
    assert 1.8 < error(40, flow, solver="euler") / error(80, flow, solver="euler") < 2.2  # first


def test_recovered_statistics() -> None:
    noise = torch.randn(2000, 1, 4, 4, generator=GENERATOR)
    y = torch.full((2000, 2, 3), 0.75)
    latents = sample(Gaussian(), Flow(), noise, y, steps=50, guidance=1)
    assert latents.mean().item() == pytest.approx(0.75, abs=0.02)
    assert latents.std().item() == pytest.approx(0.6, abs=0.02)


def test_guidance_extrapolates_the_velocity() -> None:
    # The conditional Gaussians have one spread, so guidance w moves the mean w times as far.
    guided = sample(Gaussian(), Flow(), NOISE, Y, steps=10, guidance=2.5)
    further = sample(Gaussian(), Flow(), NOISE, 2.5 * Y, steps=10, guidance=1)
    torch.testing.assert_close(guided, further, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("stored", "computed"), [(torch.float16, torch.float32), (torch.float64, torch.float64)]
)
def test_precision(stored: torch.dtype, computed: torch.dtype) -> None:
    network = Recorder()
    loss = Flow().loss(network, LATENTS.to(stored), T, EPS, Y.to(stored))
    assert loss.dtype == network.seen["x"].dtype == network.seen["y"].dtype == computed


@pytest.mark.parametrize("change", [{"logit_std": 0.0}, {"shift": -1.0}])
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Flow(**change)

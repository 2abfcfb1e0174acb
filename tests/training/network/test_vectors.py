"""The network, the loss and the sampler equal the official implementation, number by number."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkout import VECTORS
from training.network.config import DiTConfig
from training.network.dit import MicroDiT
from training.network.layers import position_table
from training.network.tokens import TokenMask
from training.objectives.edm import EDM
from training.objectives.sampler import guided, sample

OFFICIAL = load_file(VECTORS / "microdit_small.safetensors")
STATE = {k.removeprefix("state."): v for k, v in OFFICIAL.items() if k.startswith("state.")}
CONFIG = DiTConfig(
    input_size=8,
    width=64,
    depth=4,
    head_dim=16,
    multiple_of=32,
    mixer_width=48,
    mixer_depth=2,
    num_experts=4,
    caption_width=48,
    caption_length=7,
)
MASK = TokenMask(OFFICIAL["ids_keep"], OFFICIAL["ids_restore"], OFFICIAL["mask"])
MASKS = {"full": None, "masked": MASK}


@pytest.fixture
def model() -> MicroDiT:
    model = MicroDiT(CONFIG)
    model.load_state_dict(STATE)
    return model


def assert_close(actual: Tensor, name: str, tolerance: float = 3e-6) -> None:
    expected = OFFICIAL[name].double()
    assert actual.numel() == expected.numel(), name
    error = (actual.double().reshape(expected.shape) - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("kind", MASKS)
def test_output(model: MicroDiT, kind: str) -> None:
    x, c_noise, y = OFFICIAL["x"], OFFICIAL["c_noise"], OFFICIAL["y"]
    assert_close(model(x, c_noise, y, mask=MASKS[kind]), f"out_{kind}")


def test_guided_output(model: MicroDiT) -> None:
    network = guided(model, OFFICIAL["y"], None, guidance=3.0)
    assert_close(network(OFFICIAL["x"], OFFICIAL["c_noise"].repeat(2)), "out_cfg3")


@pytest.mark.parametrize("kind", MASKS)
def test_loss_and_gradients(model: MicroDiT, kind: str) -> None:
    latents, sigma, eps, y = (OFFICIAL[name] for name in ("latents", "sigma", "eps", "y"))
    loss = EDM().loss(model, latents, sigma, eps, y, mask=MASKS[kind]).mean()
    loss.backward()
    gradient = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradient) == len(list(model.parameters()))
    assert_close(loss.detach(), f"loss_{kind}")
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()
    assert_close(norm, f"grad_norm_{kind}")
    assert_close(gradient["x_embedder.proj.weight"], f"grad_xemb_{kind}")
    assert_close(gradient["blocks.1.mlp.w1"], f"grad_block1_w1_{kind}")
    assert_close(gradient["blocks.1.mlp.gate.weight"], f"grad_gate_{kind}")


def test_noise_levels_in_training() -> None:
    assert_close(EDM(p_mean=-0.6, p_std=1.2).level(OFFICIAL["rnd_normal"]), "sigma")


@pytest.mark.parametrize("guidance", [1, 3])
def test_sampler(model: MicroDiT, guidance: int) -> None:
    latents = sample(model, EDM(), OFFICIAL["z"], OFFICIAL["y"], steps=6, guidance=guidance)
    assert_close(latents, f"sampled_cfg{guidance}_steps6", tolerance=1e-5)


def test_position_tables() -> None:
    assert_close(position_table(64, grid=8, scale=1.0), "pos_embed_64_grid8_scale1")
    assert_close(position_table(64, grid=16, scale=2.0), "pos_embed_64_grid16_scale2")
    assert_close(MicroDiT(CONFIG).pos_embed, "state.pos_embed")

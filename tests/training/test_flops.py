"""The closed form equals torch's own counter, and the sizes the paper states."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.training.helpers.networks import scheme_settings
from training.flops import flops_per_image, num_parameters
from training.masking import MASKS
from training.masking.scheme import make_scheme
from training.network.config import MODELS, DiTConfig
from training.network.dit import MicroDiT

SMALL = DiTConfig(
    input_size=16,
    width=64,
    depth=5,
    head_dim=16,
    multiple_of=32,
    mixer_width=48,
    mixer_depth=3,
    num_experts=4,
    caption_width=40,
)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [(name, 0.0) for name in MASKS] + [(n, r) for n in MASKS if n != "none" for r in (0.5, 0.75)],
)
@pytest.mark.parametrize("text_tokens", [5, 77])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mixer_width": 64},
        {"mixer_depth": 0},
        {"feed_forward": "gelu", "moe_every": 0},
        {"decoder_depth": 2, "decoder_width": 32},
        {"decoder_depth": 1, "decoder_width": 80, "feed_forward": "gelu"},
    ],
    ids=str,
)
def test_equals_the_flop_counter(
    name: str, ratio: float, text_tokens: int, change: dict[str, Any]
) -> None:
    config, scheme = dataclasses.replace(SMALL, **change), make_scheme(name, scheme_settings(name))
    model = MicroDiT(config)
    mask = scheme.draw(torch.rand(1, 64), ratio)
    x, y = torch.randn(1, 4, 16, 16), torch.randn(1, text_tokens, 40)
    # The plain attention, because the counter does not know the fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, torch.zeros(1), y, mask=mask)
    assert flops_per_image(config, ratio, text_tokens, scheme) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("side", "ratio", "gflop"),
    [(32, 0.0, 246.3), (32, 0.75, 95.7), (64, 0.0, 1131.9), (64, 0.75, 382.8)],
)
def test_official_cost_is_ours_plus_one_hot_dispatch(side: int, ratio: float, gflop: float) -> None:
    """Measured GFLOP of the official implementation, which moves tokens by matrix products."""
    config = dataclasses.replace(MODELS["MicroDiT_XL_2"], input_size=side)
    kept = config.tokens - int(config.tokens * ratio)
    dispatch = 0
    for shapes, tokens in (
        (config.mixer_shapes(), config.tokens),
        (config.backbone_shapes(), kept),
    ):
        for shape in shapes:
            chosen = shape.experts * (tokens // 4)
            dispatch += 2 * 2 * chosen * tokens * shape.width
    assert (flops_per_image(config, ratio) + dispatch) / 1e9 == pytest.approx(gflop, abs=0.06)


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [
        ("MicroDiT_Tiny_2", 4, 200_692_752),
        ("MicroDiT_XL_2", 4, 1_165_442_320),
        ("MicroDiT_XL_2", 16, 1_165_540_672),
    ],
)
def test_parameters(name: str, channels: int, parameters: int) -> None:
    config = dataclasses.replace(MODELS[name], in_channels=channels)
    assert num_parameters(config) == parameters

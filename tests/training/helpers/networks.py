"""Small networks with random weights, and inputs for them."""

from __future__ import annotations

import dataclasses
import pkgutil
from typing import Any

import torch
from torch import Tensor

from training.masking import MASKS
from training.network.config import DiTConfig
from training.network.dit import MicroDiT

SMALL = DiTConfig(
    input_size=8,
    width=32,
    depth=4,
    head_dim=8,
    multiple_of=16,
    mixer_width=16,
    mixer_depth=2,
    num_experts=4,
    caption_width=24,
    caption_length=7,
)


def random_model(config: DiTConfig = SMALL, seed: int = 0) -> MicroDiT:
    """A model in which no layer is zero, so that every path shows in the output.

    In float64: experts choose by rank, so in float32 a rounding error can change who is chosen.
    """
    generator = torch.Generator().manual_seed(seed)
    model = MicroDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model.double()


def inputs(config: DiTConfig = SMALL, batch: int = 3, rows: int = 7) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    size = (batch, config.in_channels, config.input_size, config.input_size)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    c_noise = torch.randn(batch, generator=generator, dtype=torch.float64) / 4
    y = torch.randn(batch, rows, config.caption_width, generator=generator, dtype=torch.float64)
    return x, c_noise, y


def scheme_settings(name: str) -> dict[str, Any]:
    """Settings of a masking scheme that fit a small network: its own examples."""
    if name == "tread":
        return {"tread_blocks": (1, 2)}
    fields = dataclasses.fields(pkgutil.resolve_name(MASKS[name]))
    return {
        field.name: field.metadata["example"] for field in fields if "example" in field.metadata
    }

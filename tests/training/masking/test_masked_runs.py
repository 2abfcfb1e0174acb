"""Runs of the trainer whose network or masks are not those of the paper's method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.helpers.groups import make_encoders, make_source, settings
from training.config.load import resolve
from training.network.layers import position_table
from training.objectives.sampler import sample
from training.run import trainer
from training.run.preflight import check
from training.weights import weights_file

# Composer's and streaming's own warnings; ours go through SettingError.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def test_maskdit_from_a_schedule_to_a_finer_unmasked_stage(tmp_path: Path) -> None:
    """Its decoder goes through checkpoints, a change of resolution, and the weights file."""
    encoders = make_encoders(tmp_path / "encoders")
    make_source(tmp_path / "data", encoders)
    make_source(tmp_path / "data", encoders, resolution=128)
    raw = settings(tmp_path / "data", encoders, tmp_path / "run")
    raw["model"] |= {"decoder_depth": 1, "decoder_width": 32, "feed_forward": "gelu"}
    ramp = {"from": 0.75, "to": 0.25, "steps": 4, "levels": 2}
    raw["stages"] = {
        "masked": {"steps": 6, "mask": "maskdit", "mask_ratio": ramp},
        "routed": {"steps": 2, "mask": "tread", "mask_ratio": 0.5, "tread_blocks": [1, 1]},
        "fine": {"steps": 2, "resolution": 128},
    }
    trainer.run(check(resolve(raw)))
    masked, _ = weights_file.load(tmp_path / "run/masked/model.safetensors")
    network, metadata = weights_file.load(tmp_path / "run/model.safetensors")
    assert metadata.stage == "fine"
    assert masked.decoder is not None
    assert network.decoder is not None
    assert torch.equal(network.decoder.pos_embed[0], position_table(32, 8, 2.0))
    assert torch.equal(masked.decoder.pos_embed[0], position_table(32, 4, 1.0))
    moved = {
        name
        for name, value in network.named_parameters()
        if not torch.equal(value, masked.get_parameter(name))
    }
    assert moved == dict(network.named_parameters()).keys()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 16, 16, generator=generator)
    y = torch.randn(2, 5, 16, generator=generator)
    latents = sample(network, metadata.noise(), noise, y, torch.ones(2, 5, dtype=torch.bool), 2)
    assert latents.isfinite().all()

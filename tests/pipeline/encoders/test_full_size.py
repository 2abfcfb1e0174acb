"""The encoders of the paper at their real sizes, with random weights: saved as checkpoint folders,
loaded by the code that loads them from the hub, and run."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from open_clip.model import CLIPTextCfg, _build_text_tower
from safetensors.torch import save_file

from pipeline.core.tokens import dequantise, quantise
from pipeline.encoders import load_text, load_vae, text_facts, vae_facts

pytestmark = pytest.mark.slow


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "channels", "scale", "encoder", "whole"),
    [
        # 12 more channels: 110,616 in the encoder's last layer, 55,296 in the decoder's first,
        # 984 and 252 in the two 1x1 layers between.
        ("sdxl", 4, 0.13025, 34_163_592, 83_653_863),
        ("ostris16", 16, 0.24447420268654824, 34_274_208, 83_821_011),
    ],
)
def test_vae(
    tmp_path: Path, name: str, channels: int, scale: float, encoder: int, whole: int
) -> None:
    """facts/method.md §1.11: stabilityai/stable-diffusion-xl-base-1.0 vae, ostris/vae-kl-f8-d16."""
    torch.manual_seed(0)
    kind: Any = AutoencoderKL
    built = kind(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        act_fn="silu",
        latent_channels=channels,
        norm_num_groups=32,
        sample_size=1024,
        scaling_factor=scale,
        force_upcast=True,
    ).eval()
    built.save_pretrained(tmp_path, safe_serialization=True)
    vae = load_vae(str(tmp_path))
    known = vae_facts(name).model_dump(exclude={"name", "repo"})
    found = vae.facts.model_dump(exclude={"name", "repo"})
    assert found == known | {"weights_sha256": vae.facts.weights_sha256}
    assert parameters(vae.vae.encoder) == encoder
    assert parameters(vae.vae) == whole
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    latent = vae.encode(pixels)
    assert latent.shape == (1, channels, 8, 8)
    with torch.no_grad():
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        direct: Any = built.encode(x)
    assert torch.equal(latent, direct.latent_dist.mean)
    assert vae.decode(latent).shape == pixels.shape


def test_text_tower_of_dfn5b(tmp_path: Path) -> None:
    """apple/DFN5B-CLIP-ViT-H-14-378: open_clip's ViT-H-14-378-quickgelu. The image tower, 0.63
    billion parameters, is in its config and not in memory."""
    config = json.loads(
        (files(open_clip) / "model_configs" / "ViT-H-14-378-quickgelu.json").read_text()
    )
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    tower: Any = _build_text_tower(1024, CLIPTextCfg(**config["text_cfg"]), quick_gelu=True)
    tower.eval().requires_grad_(False)  # with gradients, attention takes another path
    state = {name: tensor.contiguous() for name, tensor in tower.state_dict().items()}
    # A layer norm of a trained CLIP has a few dimensions that stand far out.
    state["ln_final.weight"][[7, 300, 301]] = 30.0
    state |= {"logit_scale": torch.tensor(4.6), "visual.proj": torch.zeros(1280, 1024)}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    del state
    text: Any = load_text(str(tmp_path))
    known = text_facts("dfn5b-h14")
    assert (text.facts.width, text.facts.length) == (known.width, known.length) == (1024, 77)
    assert text.model.visual is None
    assert parameters(text.model) == 354_032_641 == parameters(tower) + 1  # the logit scale
    captions = ["a red fox on a blue background", "狐" * 10_000]
    tokens, lengths = text.encode(captions)
    assert tokens.shape == (2, 77, 1024)
    assert lengths.tolist() == [9, 77]
    ids = open_clip.get_tokenizer("ViT-H-14-378-quickgelu")(captions)
    assert ids.max(dim=1).values.tolist() == [49_407, 49_407]
    with torch.no_grad():
        x = tower.token_embedding(ids) + tower.positional_embedding
        direct = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
    assert torch.equal(tokens, direct)
    rows = tokens.numpy().reshape(-1, 1024)
    a, b = rows.astype(np.float16).astype(float), dequantise(*quantise(rows)).astype(float)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() >= 0.9995

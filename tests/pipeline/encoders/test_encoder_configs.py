"""Facts of encoders are those of the class that reads their config: its defaults, checked."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from open_clip.model import CLIPTextCfg
from transformers import CLIPConfig, CLIPTextConfig, MT5Config, T5Config, UMT5Config

from pipeline.core.errors import SettingError
from pipeline.encoders import (
    configs,
    find_text,
    find_vae,
    load_text,
    load_vae,
    locate_text,
    locate_vae,
    text_facts,
    vae_facts,
)
from tests.pipeline.helpers.text_folders import save_clip, save_t5

LEFT_OUT = "left out"


def defaults(kind: Any) -> dict[str, Any]:
    return {n: p.default for n, p in inspect.signature(kind).parameters.items()}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (configs.AutoencoderKL, AutoencoderKL),
        (configs.ClipText, CLIPTextConfig),
        (configs.T5, T5Config),
        (configs.T5, MT5Config),
        (configs.T5, UMT5Config),
        (configs.OpenClipText, CLIPTextCfg),
    ],
)
def test_defaults_are_those_of_the_libraries(ours: type[configs.Config], theirs: Any) -> None:
    expected = defaults(theirs)
    own = ours.model_construct().model_dump(exclude={"class_name"})
    for name in ("down_block_types", "up_block_types"):  # counted only where they are given
        own.pop(name, None)
    found = {name: list(v) if isinstance(v, tuple) else v for name, v in expected.items()}
    assert own == {name: found[name] for name in own}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an encoder's folder: "vae", "open_clip", or a kind of `text_folders`."""
    kind = request.param
    path = tmp_path / kind
    if kind == "vae":
        return shutil.copytree(find_vae("tiny4")[1], path)
    if kind == "open_clip":
        return shutil.copytree(find_text("tiny-clip")[1], path)
    return save_t5(path, kind) if kind == "t5" else save_clip(path, kind)


def change(path: Path, key: str, value: Any) -> None:
    record = json.loads(path.read_text())
    *sections, name = key.split(".")
    section = record
    for part in sections:
        section = section[part]
    if value is LEFT_OUT:
        section.pop(name, None)
    else:
        section[name] = value
    path.write_text(json.dumps(record))


VAE = ("vae", "config.json")
OPEN_CLIP = ("open_clip", "open_clip_config.json")
CLIP = ("clip", "config.json")
ALONE = ("clip_text_model", "config.json")
T5 = ("t5", "config.json")


@pytest.mark.parametrize(
    ("folder", "file", "key", "fact", "value"),
    [
        (*VAE, "scaling_factor", "scale", 0.18215),
        (*VAE, "shift_factor", "shift", 0.0),
        (*VAE, "latent_channels", "channels", 4),
        (*VAE, "latents_mean", "shift", -0.0253),
        (*OPEN_CLIP, "model_cfg.text_cfg.width", "width", 512),
        (*OPEN_CLIP, "model_cfg.text_cfg.context_length", "length", 77),
        (*CLIP, "text_config.hidden_size", "width", 512),
        (*CLIP, "text_config", "length", 77),
        (*ALONE, "max_position_embeddings", "length", 77),
        (*T5, "d_model", "width", 512),
    ],
    indirect=["folder"],
)
def test_what_a_config_leaves_out(
    folder: Path, file: str, key: str, fact: str, value: float
) -> None:
    change(folder / file, key, LEFT_OUT)
    facts = (vae_facts if folder.name == "vae" else text_facts)(str(folder))
    assert facts.model_dump()[fact] == value


def test_a_vae_without_a_scale_is_loaded_with_its_classs(tmp_path: Path) -> None:
    folder = shutil.copytree(find_vae("tiny4")[1], tmp_path / "vae")
    change(folder / "config.json", "scaling_factor", LEFT_OUT)
    vae = load_vae(str(folder))
    assert vae.facts.scale == vae.vae.config.scaling_factor == 0.18215


def test_the_older_form_of_a_clip_config(tmp_path: Path) -> None:
    """transformers lets `text_config_dict`, with the defaults of its class, replace the other."""
    record = {
        "model_type": "clip",
        "text_config": {"hidden_size": 64, "max_position_embeddings": 20},
        "text_config_dict": {"hidden_size": 32},
    }
    (tmp_path / "config.json").write_text(json.dumps(record))
    own: Any = CLIPConfig(**record).text_config
    facts = text_facts(str(tmp_path))
    assert (facts.width, facts.length) == (32, 77)
    assert (facts.width, facts.length) == (own.hidden_size, own.max_position_embeddings)


@pytest.mark.parametrize(
    ("folder", "file", "key", "value"),
    [
        *((*VAE, "scaling_factor", v) for v in (None, "0.13", 0, -1, float("nan"), [0.1], True)),
        *((*VAE, "latent_channels", v) for v in (None, 0, 4.5, "4")),
        *((*VAE, "block_out_channels", v) for v in (None, [], [16, 32], 4, [0, 1, 2, 3])),
        *((*VAE, "shift_factor", v) for v in ("0", float("inf"), [])),
        *((*VAE, key, [0.0] * 4) for key in ("latents_mean", "latents_std")),
        *((*VAE, "_class_name", v) for v in ("AutoencoderTiny", "AutoencoderDC", None)),
        (*VAE, "in_channels", 4),
        (*VAE, "down_block_types", ["DownEncoderBlock2D"]),
        *((*OPEN_CLIP, "model_cfg.text_cfg.width", v) for v in (None, "128", 0)),
        (*OPEN_CLIP, "model_cfg.text_cfg.context_length", None),
        *((*OPEN_CLIP, key, v) for key in ("model_cfg.text_cfg", "model_cfg") for v in (None, [])),
        (*OPEN_CLIP, "model_cfg", LEFT_OUT),
        *((*OPEN_CLIP, f"model_cfg.text_cfg.{k}", True) for k in ("embed_cls", "no_causal_mask")),
        (*OPEN_CLIP, "model_cfg.text_cfg.final_ln_after_pool", True),
        *((*CLIP, "text_config.hidden_size", v) for v in (None, 0, "32")),
        (*ALONE, "max_position_embeddings", None),
        *((*T5, "d_model", v) for v in (None, -1, 3.5)),
        ("t5", "tokenizer_config.json", "model_max_length", "long"),
        (*T5, "model_type", ["t5"]),
    ],
    indirect=["folder"],
)
def test_a_value_that_its_class_cannot_use_is_one_line(
    folder: Path, file: str, key: str, value: Any
) -> None:
    change(folder / file, key, value)
    find: Any = find_vae if folder.name == "vae" else find_text
    with pytest.raises(SettingError) as error:
        find(str(folder))
    assert "\n" not in str(error.value)
    assert str(folder / file) in str(error.value)
    assert key.rpartition(".")[2] in str(error.value)


@pytest.mark.parametrize("folder", ["vae", "open_clip", "clip", "t5"], indirect=True)
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe{", b"[" * 100_000])
def test_a_config_that_is_broken_is_one_line(folder: Path, data: bytes) -> None:
    path = folder / ("open_clip_config.json" if folder.name == "open_clip" else "config.json")
    path.write_bytes(data)
    find: Any = find_vae if folder.name == "vae" else find_text
    with pytest.raises(SettingError, match=r"is no JSON") as error:
        find(str(folder))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("folder", "file", "key", "value", "what"),
    [
        (*VAE, "latent_channels", 8, "do not fit"),
        (*VAE, "norm_num_groups", 0, "do not fit"),
        (*VAE, "use_quant_conv", False, "has no place for 2 tensors"),
        (*VAE, "quantization_config", {"quant_method": "bitsandbytes"}, "do not fit"),
        (*VAE, "down_block_types", LEFT_OUT, "has downsample 2, its config was read as 8"),
        (*OPEN_CLIP, "model_cfg.text_cfg.context_length", 77, "does not fit its config"),
        (*OPEN_CLIP, "model_cfg.text_cfg.heads", 3, "do not fit"),
        (*CLIP, "text_config.hidden_size", 64, "do not fit"),
        (*CLIP, "text_config.num_hidden_layers", 1, "has no place for 16 tensors"),
        (*CLIP, "text_config.layer_norm_eps", None, "do not fit"),
        (*ALONE, "num_attention_heads", 0, "do not fit"),
        (*T5, "layer_norm_epsilon", "x", "do not fit"),
        (*T5, "num_layers", 1, "has no place for"),
        ("t5", "tokenizer_config.json", "pad_token", None, "has no pad_token"),
        ("t5", "tokenizer_config.json", "eos_token", "a", "do not end in its eos_token"),
    ],
    indirect=["folder"],
)
def test_a_config_that_is_not_that_of_the_weights_is_one_line(
    folder: Path, file: str, key: str, value: Any, what: str
) -> None:
    change(folder / file, key, value)
    load: Any = load_vae if folder.name == "vae" else load_text
    with pytest.raises(SettingError, match=what) as error:
        load(str(folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("data", [b"", b"junk" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_vae_weights_that_are_none_are_one_line(tmp_path: Path, data: bytes) -> None:
    folder = shutil.copytree(find_vae("tiny4")[1], tmp_path / "vae")
    next(folder.glob("*.safetensors")).write_bytes(data)
    with pytest.raises(SettingError, match=r"cannot be loaded|lacks 164 of its tensors") as error:
        load_vae(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./there", "~/vae", "a/b/c"])
def test_a_folder_that_is_not_there_is_said_to_be_one(name: str) -> None:
    for locate in (locate_vae, locate_text):
        with pytest.raises(SettingError, match="there is no such folder"):
            locate(name)

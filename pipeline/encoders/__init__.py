"""Images and text to tensors and back: two tables of encoders, and what is known of each for free.

The facts here need no weights and no network, so a YAML that names `vae: sdxl` can be checked on a
laptop. Encoders that ship with the package state theirs in their own config files.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline.core.errors import SettingError, nearest
from pipeline.core.manifest import TextFacts, VaeFacts
from pipeline.encoders.hub import folder_of, require_files, weights_hash

_WEIGHTS = Path(str(files("pipeline.encoders") / "weights"))

#: Name -> (repo or folder, subfolder).
VAES: dict[str, tuple[str, str]] = {
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "vae"),
    "ostris16": ("ostris/vae-kl-f8-d16", ""),
    "tiny4": (str(_WEIGHTS / "tiny4"), ""),
    "tiny16": (str(_WEIGHTS / "tiny16"), ""),
}

#: Name -> open_clip model: "hf-hub:ID" or "local-dir:FOLDER".
TEXT_ENCODERS: dict[str, str] = {
    "dfn5b-h14": "hf-hub:apple/DFN5B-CLIP-ViT-H-14-378",
    "tiny-clip": f"local-dir:{_WEIGHTS / 'tiny-clip'}",
    "tiny-clip-judge": f"local-dir:{_WEIGHTS / 'tiny-clip-judge'}",
}

#: Facts of the encoders whose configs are not in the package (facts of the hub's config files).
_KNOWN_VAES: dict[str, dict[str, Any]] = {
    "sdxl": {"channels": 4, "downsample": 8, "scale": 0.13025, "shift": 0.0},
    "ostris16": {"channels": 16, "downsample": 8, "scale": 0.24447420268654824, "shift": 0.0},
}
_KNOWN_TEXT: dict[str, dict[str, Any]] = {"dfn5b-h14": {"width": 1024, "length": 77}}


def vae_facts(name: str) -> VaeFacts:
    """What is known of a VAE without its weights.

    Raises:
        SettingError: no such name in the table and no such folder.
    """
    if name in _KNOWN_VAES:
        return VaeFacts(name=name, repo=VAES[name][0], **_KNOWN_VAES[name])
    repo, subfolder = locate_vae(name)
    config = Path(repo, subfolder, "config.json")
    if not config.is_file():
        raise SettingError(f"vae={name}: {config} is missing; a VAE folder holds config.json")
    return vae_facts_of(name, repo, json.loads(config.read_text()))


def vae_facts_of(name: str, repo: str, config: dict) -> VaeFacts:
    """Facts out of a diffusers AutoencoderKL config."""
    return VaeFacts(
        name=name,
        repo=public_repo(repo),
        channels=config["latent_channels"],
        downsample=2 ** (len(config["block_out_channels"]) - 1),
        scale=config.get("scaling_factor", 1.0),
        shift=config.get("shift_factor") or 0.0,
    )


def text_facts(name: str) -> TextFacts:
    """What is known of a text encoder without its weights.

    Raises:
        SettingError: no such name in the table and no such folder.
    """
    repo = locate_text(name)
    if name in _KNOWN_TEXT:
        return TextFacts(name=name, repo=repo, **_KNOWN_TEXT[name])
    config = Path(repo.removeprefix("local-dir:"), "open_clip_config.json")
    if not config.is_file():
        raise SettingError(f"text_encoder={name}: {config} is missing")
    return text_facts_of(name, repo, json.loads(config.read_text())["model_cfg"]["text_cfg"])


def text_facts_of(name: str, repo: str, text_cfg: dict) -> TextFacts:
    """Facts out of an open_clip text config."""
    return TextFacts(
        name=name,
        repo=public_repo(repo),
        width=text_cfg["width"],
        length=text_cfg.get("context_length", 77),
    )


def locate_vae(name: str) -> tuple[str, str]:
    """(repo or folder, subfolder) of a table name, a folder, or a hub id "owner/name"."""
    if name in VAES:
        return VAES[name]
    if Path(name).is_dir() or name.count("/") == 1:
        return name, ""
    raise SettingError(f"vae={name}: unknown{nearest(name, VAES)}; known: {', '.join(VAES)}")


def locate_text(name: str) -> str:
    """open_clip's name of a table name, a folder, or a hub id "owner/name"."""
    if name in TEXT_ENCODERS:
        return TEXT_ENCODERS[name]
    if Path(name).is_dir():
        return f"local-dir:{name}"
    if name.count("/") == 1:
        return f"hf-hub:{name}"
    raise SettingError(
        f"text_encoder={name}: unknown{nearest(name, TEXT_ENCODERS)}; "
        f"known: {', '.join(TEXT_ENCODERS)}"
    )


def public_repo(repo: str) -> str:
    """The repo as a manifest may show it: where the package is installed is nobody's business."""
    return repo.replace(str(_WEIGHTS), "package:weights")


def find_vae(name: str) -> tuple[VaeFacts, Path]:
    """Facts with the weights' hash, and the folder that holds them; loads no torch.

    Raises:
        SettingError: unknown name, weights not in the cache, or a folder that misses a file.
    """
    repo, subfolder = locate_vae(name)
    folder, revision = folder_of(name, repo, subfolder)
    require_files(f"vae={name}", folder, "config.json", "diffusion_pytorch_model.safetensors")
    facts = vae_facts_of(name, repo, json.loads((folder / "config.json").read_text()))
    found = {"revision": revision, "weights_sha256": weights_hash(folder)}
    return facts.model_copy(update=found), folder


def find_text(name: str) -> tuple[TextFacts, Path]:
    """Facts with the weights' hash, and the folder that holds them; loads no torch.

    Raises:
        SettingError: unknown name, weights not in the cache, or a folder that misses a file.
    """
    repo = locate_text(name)
    folder, revision = folder_of(name, repo.split(":", 1)[1])
    require_files(f"text_encoder={name}", folder, "open_clip_config.json")
    config = json.loads((folder / "open_clip_config.json").read_text())
    facts = text_facts_of(name, repo, config["model_cfg"]["text_cfg"])
    found = {"revision": revision, "weights_sha256": weights_hash(folder)}
    return facts.model_copy(update=found), folder


def load_vae(name: str):
    """`autoencoder.load_vae`, imported on use: the tables above must stay free of torch."""
    from pipeline.encoders.autoencoder import load_vae

    return load_vae(name)


def load_text(name: str):
    """`clip.load_text`, imported on use: the tables above must stay free of torch."""
    from pipeline.encoders.clip import load_text

    return load_text(name)

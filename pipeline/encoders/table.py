"""Two tables of encoders, and what is known of each for free.

The facts here need no weights and no network, so a YAML that names `vae: sdxl` can be checked on a
laptop. Encoders that ship with the package state theirs in their own config files, and so do a
folder and a hub repo in the local cache.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.errors import SettingError, nearest
from pipeline.core.manifest import TextFacts, VaeFacts
from pipeline.encoders import configs
from pipeline.encoders.families import TextConfig, require_text_files, text_config
from pipeline.encoders.hub import (
    check_hash,
    folder_of,
    is_hub_id,
    require_files,
    split_revision,
    weights_hash,
)

Facts = TypeVar("Facts", VaeFacts, TextFacts)

_WEIGHTS = Path(str(files("pipeline.encoders") / "weights"))

#: Name -> (repo or folder, subfolder).
VAES: dict[str, tuple[str, str]] = {
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "vae"),
    "ostris16": ("ostris/vae-kl-f8-d16", ""),
    "tiny4": (str(_WEIGHTS / "tiny4"), ""),
    "tiny16": (str(_WEIGHTS / "tiny16"), ""),
}

#: Name -> "hf-hub:ID" or "local-dir:FOLDER".
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

#: Name of either table -> what `weights_hash` says of its folder; other weights are refused.
#: A test compares those that ship, so `make tiny-weights` changes these lines as well.
WEIGHTS_SHA256: dict[str, str] = {
    "tiny4": "5f3a5cfd864a713e85b895318eaf77460db09f3465f00f8538e87a9a791de4a2",
    "tiny16": "09e500d5e11e1a6aff12fad4e2443d702ec1b48d9af49679147b25c3e3a4d6f6",
    "tiny-clip": "c39a8621af44f820e0666b5b5c632b93555ea92470dbd1d55c9f99a9ee08c08c",
    "tiny-clip-judge": "0fd23010eb6951d55cbf243062dcf80966c175eadd7ce2536d210f16106e85fd",
}


def vae_facts(name: str) -> VaeFacts:
    """What is known of a VAE without its weights.

    Raises:
        SettingError: no such name in the table, no such folder, not in the hub's local cache, or a
            config that says nothing usable.
    """
    repo, subfolder = locate_vae(name)
    if name in _KNOWN_VAES:
        return VaeFacts(name=name, repo=repo, **_KNOWN_VAES[name])
    folder, _ = folder_of(name, repo, subfolder)
    config = folder / "config.json"
    if not config.is_file():
        raise SettingError(f"vae={name}: {config} is missing; a VAE folder holds config.json")
    return _vae_facts_of(name, repo, config)


def _vae_facts_of(name: str, repo: str, path: Path) -> VaeFacts:
    """Facts out of a diffusers AutoencoderKL's config file."""
    config = configs.read(f"vae={name}", path, configs.AutoencoderKL)
    return VaeFacts(
        name=name,
        repo=public_repo(repo),
        channels=config.latent_channels,
        downsample=config.downsample(),
        scale=config.scaling_factor,
        shift=config.shift_factor or 0.0,
    )


def text_facts(name: str) -> TextFacts:
    """What is known of a text encoder without its weights.

    Raises:
        SettingError: no such name in the table, no such folder, not in the hub's local cache, or
            a model that is not supported.
    """
    repo = locate_text(name)
    if name in _KNOWN_TEXT:
        return TextFacts(name=name, repo=repo, **_KNOWN_TEXT[name])
    folder, _ = folder_of(name, repo.split(":", 1)[1])
    return _text_facts_of(name, repo, text_config(f"text_encoder={name}", folder))


def _text_facts_of(name: str, repo: str, config: TextConfig) -> TextFacts:
    repo = public_repo(repo)
    return TextFacts(name=name, repo=repo, width=config.width, length=config.length)


def locate_vae(name: str) -> tuple[str, str]:
    """(repo or folder, subfolder) of a table name, a folder, or a hub id "owner/name[@revision]".

    Raises:
        SettingError: it is none of these.
    """
    if name in VAES:
        return VAES[name]
    if os.path.isdir(name) or is_hub_id(name):
        return name, ""
    raise _unknown("vae", name, VAES)


def locate_text(name: str) -> str:
    """ "hf-hub:ID" or "local-dir:FOLDER" of a table name, a folder, or "owner/name[@revision]".

    Raises:
        SettingError: it is none of these.
    """
    if name in TEXT_ENCODERS:
        return TEXT_ENCODERS[name]
    if os.path.isdir(name):
        return f"local-dir:{name}"
    if is_hub_id(name):
        return f"hf-hub:{name}"
    raise _unknown("text_encoder", name, TEXT_ENCODERS)


def _unknown(setting: str, name: str, table: Collection[str]) -> SettingError:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return SettingError(f"{setting}={name}: there is no such folder")
    return SettingError(
        f"{setting}={name}: unknown{nearest(name, table)}; known: {', '.join(table)}, "
        "a folder, or a hub id owner/name"
    )


def public_repo(repo: str) -> str:
    """The repo as a manifest may show it: where the package is installed is nobody's business, and
    a hub repo's revision has a field of its own."""
    if not repo.startswith("local-dir:"):
        repo, _ = split_revision(repo)
    return repo.replace(str(_WEIGHTS), "package:weights")


def find_vae(name: str) -> tuple[VaeFacts, Path]:
    """Facts with the weights' hash, and the folder that holds them; loads no torch.

    Raises:
        SettingError: unknown name, weights not in the cache, a folder that misses a file, or
            weights that are not those of the table.
    """
    repo, subfolder = locate_vae(name)
    folder, revision = folder_of(name, repo, subfolder)
    require_files(f"vae={name}", folder, "config.json", "diffusion_pytorch_model.safetensors")
    facts = _vae_facts_of(name, repo, folder / "config.json")
    return _with_weights(f"vae={name}", facts, folder, revision), folder


def find_text(name: str) -> tuple[TextFacts, Path]:
    """Facts with the weights' hash, and the folder that holds them; loads no torch.

    Raises:
        SettingError: unknown name, weights not in the cache, a folder that misses a file or is of
            a model that is not supported, or weights that are not those of the table.
    """
    setting = f"text_encoder={name}"
    repo = locate_text(name)
    folder, revision = folder_of(name, repo.split(":", 1)[1])
    config = text_config(setting, folder)
    require_text_files(setting, folder, config.family)
    facts = _text_facts_of(name, repo, config)
    return _with_weights(setting, facts, folder, revision), folder


def _with_weights(setting: str, facts: Facts, folder: Path, revision: str) -> Facts:
    found = weights_hash(folder)
    check_hash(setting, folder, WEIGHTS_SHA256.get(facts.name), found)
    return facts.model_copy(update={"revision": revision, "weights_sha256": found})

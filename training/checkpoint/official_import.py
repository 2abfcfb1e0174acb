"""An official checkpoint -> weights with metadata, for `training.generate` and `init_from`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from pydantic import ValidationError

from pipeline.core.errors import SettingError, nearest
from pipeline.core.manifest import TextFacts, VaeFacts
from pipeline.core.text_files import read_yaml_text
from pipeline.core.yaml12 import parse
from pipeline.encoders import text_facts, vae_facts
from training.config.sampling_options import require_folder
from training.config.settings import Model
from training.network.config import MODELS, DiTConfig
from training.network.dit import MicroDiT
from training.objectives.edm import EDM
from training.weights import official, weights_file
from training.weights.tensors import require_numbers

SIGMA_DATA = 0.9
VAES = {4: "sdxl", 16: "ostris16"}
"""Latent channels -> the VAE of the released checkpoints that have them."""


def import_file(path: Path, out: Path, arch: str, vae: str, text_encoder: str) -> str:
    """Writes `out/model.safetensors`, tensors bit for bit as in the file.

    Args:
        arch: a network's name, or a YAML with a section `model:`; "" lets the shapes decide.
        vae: name, folder or hub id; "" is that of the released checkpoints.
        text_encoder: likewise.

    Returns:
        What to tell the user.

    Raises:
        SettingError: a file that is none, holds more than data or NaN, or is of another network.
    """
    base = architecture(arch) if arch else None
    text, image = text_facts(text_encoder), vae_facts(vae) if vae else None
    require_folder("--out", out)
    found = official.read(path)
    config = official.recognise(path, found.tensors, base)
    require_numbers(path, found.tensors)
    name = vae or VAES.get(config.in_channels)
    if name is None:
        raise SettingError(
            f"{path}: {config.in_channels} latent channels, of no released checkpoint; name the "
            "VAE with --vae"
        )
    metadata = _metadata(path, config, image or vae_facts(name), text)
    out.mkdir(parents=True, exist_ok=True)
    weights_file.write(out / "model.safetensors", found.tensors, metadata)
    beside = f"; {found.ignored} tensors beside the network left out" if found.ignored else ""
    return (
        f"{out / 'model.safetensors'}: {metadata.resolution} px, vae {metadata.vae.name}, text "
        f"{metadata.text_encoder.name}{beside}; see python -m training.generate --checkpoint {out}"
        f"{official.shift_note(metadata.vae)}"
    )


def architecture(arch: str) -> DiTConfig:
    """The network of a name, or of the section `model:` of a YAML file.

    Raises:
        SettingError: neither.
    """
    if arch in MODELS:
        return MODELS[arch]
    if not Path(arch).is_file():
        raise SettingError(
            f"--arch {arch}: unknown{nearest(arch, MODELS)}; known: {', '.join(MODELS)}, or a YAML "
            "file with a section model:"
        )
    try:
        section = Model.model_validate(parse(read_yaml_text(Path(arch)), arch)["model"])
        return dataclasses.replace(MODELS.get(section.arch, DiTConfig()), **section.sizes())
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())[:200]
        raise SettingError(f"--arch {arch}: no usable section model: ({text})") from error


def _metadata(
    path: Path, config: DiTConfig, vae: VaeFacts, text: TextFacts
) -> weights_file.WeightsMetadata:
    for what, option, own, facts, other in (
        ("latent channels", "--vae", config.in_channels, vae, vae.channels),
        ("token width", "--text-encoder", config.caption_width, text, text.width),
    ):
        if own != other:
            raise SettingError(
                f"{path}: {what} {own}, but {other} with {option} {facts.name}; name the right one"
            )
    config = dataclasses.replace(config, caption_length=text.length)
    with torch.device("meta"):
        network = MicroDiT(config)
    return weights_file.WeightsMetadata(
        run=path.stem,
        stage="imported",
        step=0,
        weights="live",
        ema=None,
        **weights_file.facts(network, EDM(sigma_data=SIGMA_DATA)),
        resolution=config.input_size * vae.downsample,
        vae=vae,
        text_encoder=text,
        text="full",  # the official code attends padding
        captions="",
        latents_manifests={},
        text_manifests={},
        attribution=[],
        config={"imported": {"file": path.name, "sha256": weights_file.file_hash(path)}},
    )

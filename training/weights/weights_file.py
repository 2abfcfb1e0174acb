"""Weights as safetensors with their metadata: a file alone says how to generate with it.

The tensors have the names and shapes of the released checkpoints. The metadata is JSON under the
metadata key "microdit".
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.core.errors import SettingError
from training.network.dit import MicroDiT
from training.objectives.denoiser import Denoiser
from training.weights.tensors import read_tensors, require_fit, require_numbers
from training.weights.weights_metadata import (
    METADATA_KEY,
    WeightsMetadata,
    file_hash,
    find,
    read_metadata,
)

# Most of them of training.weights.weights_metadata, which needs no torch.
__all__ = ["METADATA_KEY", "WeightsMetadata", "file_hash", "find", "read_metadata", "read_tensors"]

#: Source -> what has to be said wherever pictures of its kind, or weights trained on it, appear.
ATTRIBUTIONS = {
    "openmoji": "Trained on pictures of OpenMoji (openmoji.org), CC BY-SA 4.0",
}


def write(path: Path, tensors: dict[str, Tensor], metadata: WeightsMetadata) -> None:
    """Tensors as they are, of whatever type; the file appears whole under its name, or not at all.

    Raises:
        OSError: no room, or no right to write there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        _save_file(_apart(tensors), part, {METADATA_KEY: metadata.model_dump_json()})
        with contextlib.suppress(PermissionError):  # of file systems that have no modes
            part.chmod(0o644)  # safetensors gives the owner alone access
        with open(part, "rb") as file:  # its name says that a stage is finished
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in memory of its own: tied tensors are written once for each name."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in tensors.items():
        value = value.cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in places else value
        places.add(place)
    return found


def _save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(" ".join(str(error).split())) from error


def read(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], WeightsMetadata]:
    """The tensors of a weights file as they are stored, and its metadata, which they fit.

    Raises:
        SettingError: as `read_metadata`; tensors that do not fit the metadata's network, or that
            hold NaN or infinities.
    """
    metadata = read_metadata(path)
    try:
        metadata.noise()
    except (TypeError, ValueError) as error:
        raise SettingError(f"{path}: broken metadata (objective: {error})") from error
    tensors = read_tensors(path, device)
    require_fit(path, tensors, metadata.network(), "its metadata's network")
    require_numbers(path, tensors)
    return tensors, metadata


def load(path: Path, device: str = "cpu") -> tuple[MicroDiT, WeightsMetadata]:
    """The network in eval mode, and its metadata.

    Raises:
        SettingError: as `read`.
    """
    stored, metadata = read(path, device)
    # A released file may hold bfloat16; the network computes in float32, or as autocast says.
    with torch.device("meta"):
        network = MicroDiT(metadata.network())
    network.load_state_dict({n: value.float() for n, value in stored.items()}, assign=True)
    return network.eval().requires_grad_(False), metadata


def attributions(sources: list[str]) -> list[str]:
    """What has to be said of weights trained on these sources."""
    return [ATTRIBUTIONS[source] for source in sources if source in ATTRIBUTIONS]


def facts(network: MicroDiT, denoiser: Denoiser) -> dict[str, Any]:
    """The metadata's entries for a network and its objective."""
    fields = dataclasses.asdict(denoiser)  # pyright: ignore (a Protocol cannot say dataclass)
    return {
        "model": dataclasses.asdict(network.config),
        "objective": {"name": denoiser.name, **fields},
    }

"""Weights as safetensors with their passport: a file alone says how to generate with it.

The tensors have the names and shapes of the released checkpoints. The passport is JSON under the
metadata key "microdit".
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pkgutil
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.core.errors import SettingError
from pipeline.core.manifest import LatentsManifest, TextFacts, TextManifest, VaeFacts
from training.dit import MicroDiT
from training.dit_config import DiTConfig
from training.header import METADATA_KEY, SCHEMA, file_hash, find, read_record
from training.objectives import OBJECTIVES
from training.objectives.denoiser import Denoiser

__all__ = ["METADATA_KEY", "file_hash", "find"]  # of training.header, which needs no torch

#: Source -> what has to be said wherever pictures of its kind, or weights trained on it, appear.
ATTRIBUTIONS = {
    "openmoji": "Trained on pictures of OpenMoji (openmoji.org), CC BY-SA 4.0",
}


class Passport(BaseModel):
    """What made the weights, and what they need to make a picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA
    run: str
    stage: str
    step: int  # of the stage
    weights: Literal["ema", "live"]
    ema: float | str | None  # decay a step, or the name of another average: power-0.1
    model: dict[str, Any]  # fields of DiTConfig
    objective: dict[str, Any]  # its name in OBJECTIVES, and its fields
    resolution: int  # side of the pictures, pixels
    vae: VaeFacts
    text_encoder: TextFacts
    text: str  # "full" or "trimmed": how captions are attended
    captions: str
    latents_manifests: dict[str, LatentsManifest]  # by source
    text_manifests: dict[str, TextManifest]
    attribution: list[str]
    config: dict[str, Any]  # the run's resolved settings

    def network(self) -> DiTConfig:
        return DiTConfig(**self.model)

    def noise(self) -> Denoiser:
        fields = {key: value for key, value in self.objective.items() if key != "name"}
        return pkgutil.resolve_name(OBJECTIVES[self.objective["name"]])(**fields)

    @model_validator(mode="before")
    @classmethod
    def _schema_1(cls, record: Any) -> Any:
        """Before there were other objectives, the fields of EDM stood under `edm`."""
        if isinstance(record, dict) and "edm" in record:
            record = {**record, "objective": {"name": "edm", **record["edm"]}}
            del record["edm"]
        return record

    @field_validator("objective")
    @classmethod
    def _known(cls, objective: dict[str, Any]) -> dict[str, Any]:
        if objective.get("name") not in OBJECTIVES:
            raise ValueError(f"name {objective.get('name')}: known are {', '.join(OBJECTIVES)}")
        return objective


def write(path: Path, tensors: dict[str, Tensor], passport: Passport) -> None:
    """Tensors as they are, of whatever type; the file appears whole under its name, or not at all.

    Raises:
        OSError: no room, or no right to write there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        _save_file(
            {name: value.cpu().contiguous() for name, value in tensors.items()},
            part,
            {METADATA_KEY: passport.model_dump_json()},
        )
        with contextlib.suppress(PermissionError):  # of file systems that have no modes
            part.chmod(0o644)  # safetensors gives the owner alone access
        with open(part, "rb") as file:  # its name says that a stage is finished
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(" ".join(str(error).split())) from error


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a weights file, in the types in which they are stored."""
    return load_file(path, device)


def read_passport(path: Path) -> Passport:
    """The passport of a weights file.

    Raises:
        SettingError: no such file, no safetensors, or no passport of this version in it.
    """
    record = read_record(path)
    try:
        return Passport.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SettingError(f"{path}: broken passport ({where}: {first['msg']})") from error


def load(path: Path, device: str = "cpu") -> tuple[MicroDiT, Passport]:
    """The network in eval mode, and its passport.

    Raises:
        SettingError: as `read_passport`, or tensors that do not fit the passport's network.
    """
    passport = read_passport(path)
    # A released file may hold bfloat16; the network computes in float32, or as autocast says.
    tensors = {name: value.float() for name, value in read_tensors(path, device).items()}
    with torch.device("meta"):
        network = MicroDiT(passport.network())
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise SettingError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    return network.eval().requires_grad_(False), passport


def attributions(sources: list[str]) -> list[str]:
    """What has to be said of weights trained on these sources."""
    return [ATTRIBUTIONS[source] for source in sources if source in ATTRIBUTIONS]


def facts(network: MicroDiT, denoiser: Denoiser) -> dict[str, Any]:
    """The passport's entries for a network and its objective."""
    fields = dataclasses.asdict(denoiser)  # pyright: ignore (a Protocol cannot say dataclass)
    return {
        "model": dataclasses.asdict(network.config),
        "objective": {"name": denoiser.name, **fields},
    }

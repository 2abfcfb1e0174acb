"""What a weights file says of itself, read without torch: where it is, its metadata, its content's
hash. Everything that opens a weights file asks here first."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
    with_config,
)
from safetensors import SafetensorError, safe_open

from pipeline.core.errors import SettingError
from pipeline.core.manifest import LatentsManifest, TextFacts, TextManifest, VaeFacts
from training.network.config import DiTConfig
from training.objectives import OBJECTIVES

if TYPE_CHECKING:
    from training.objectives.denoiser import Denoiser

METADATA_KEY = "microdit"
SCHEMA = 2
LFS_POINTER = b"version https://git-lfs"  # what Git leaves in a large file's place without LFS

# Strict: a width in quotes, or one that no network has, is a broken metadata.
_NETWORK = TypeAdapter(
    with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))(DiTConfig)
)


class WeightsMetadata(BaseModel):
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
    text: Literal["full", "trimmed"]  # how captions are attended
    captions: str
    latents_manifests: dict[str, LatentsManifest]  # by source
    text_manifests: dict[str, TextManifest]
    attribution: list[str]
    config: dict[str, Any]  # the run's resolved settings
    #: Source -> reason -> pictures that the stage did not see, or "damaged shards" -> shards.
    left_out: dict[str, dict[str, int]] = {}

    def network(self) -> DiTConfig:
        return DiTConfig(**self.model)

    def noise(self) -> Denoiser:
        """The objective; imports torch.

        Raises:
            TypeError: a field that it does not have.
            ValueError: a number that it cannot have.
        """
        fields = {key: value for key, value in self.objective.items() if key != "name"}
        return pkgutil.resolve_name(OBJECTIVES[self.objective["name"]])(**fields)

    @model_validator(mode="before")
    @classmethod
    def _schema_1(cls, record: Any) -> Any:
        """Before there were other objectives, the fields of EDM stood under `edm`."""
        if isinstance(record, dict) and isinstance(record.get("edm"), dict):
            record = {**record, "objective": {"name": "edm", **record["edm"]}}
            del record["edm"]
        return record

    @field_validator("model")
    @classmethod
    def _network(cls, model: dict[str, Any]) -> dict[str, Any]:
        try:
            _NETWORK.validate_json(json.dumps(model))
        except ValidationError as error:
            raise ValueError(_first(error)) from error
        return model

    @field_validator("objective")
    @classmethod
    def _objective(cls, objective: dict[str, Any]) -> dict[str, Any]:
        if objective.get("name") not in list(OBJECTIVES):  # which compares, whatever it is
            raise ValueError(f"name {objective.get('name')}: known are {', '.join(OBJECTIVES)}")
        for key, value in objective.items():
            if key != "name" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{key} {value!r}: is no number")
        return objective

    @model_validator(mode="after")
    def _fits(self) -> WeightsMetadata:
        network, vae, text = self.network(), self.vae, self.text_encoder
        if not vae.scale > 0:
            raise ValueError(f"vae.scale {vae.scale}: must be above 0")
        for key, own, theirs in (
            ("in_channels", network.in_channels, vae.channels),
            ("caption_width", network.caption_width, text.width),
            ("input_size", network.input_size * vae.downsample, self.resolution),
        ):
            if own != theirs:
                raise ValueError(f"model.{key} {own} does not fit its encoders' {theirs}")
        return self


def find(checkpoint: str) -> Path:
    """The weights file of a run's folder, or the file itself.

    Raises:
        SettingError: nothing there, or no path.
    """
    if not checkpoint or "://" in checkpoint:
        raise SettingError(
            f'checkpoint "{checkpoint}": give a path on this machine, of a run\'s folder or a file'
        )
    path = Path(checkpoint)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise SettingError(
            f"checkpoint {checkpoint}: no file {path}; a run writes it at the end of each "
            "stage, and of a file of the official code python -m training.convert import makes one"
        )
    return path


def require_content(path: Path) -> None:
    """That there is a file with something of its own in it.

    Raises:
        SettingError: a folder, an empty file, one that may not be read, or what Git leaves in the
            place of a large file.
        FileNotFoundError: nothing is there.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except FileNotFoundError:
        raise
    except IsADirectoryError as error:
        raise SettingError(f"{path}: is a folder; give the checkpoint's file") from error
    except OSError as error:
        raise SettingError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise SettingError(f"{path}: is empty (truncated to nothing); copy the file again")
    if start == LFS_POINTER:
        raise SettingError(
            f"{path}: holds a pointer of Git LFS instead of the file; run `git lfs pull` there"
        )


def read_record(path: Path) -> dict[str, Any]:
    """The metadata of a weights file as it is written there.

    Raises:
        SettingError: no such file, no safetensors, or no metadata of this version in it.
    """
    try:
        require_content(path)
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise SettingError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise SettingError(
            f"{path}: no safetensors file, or a truncated one ({_short(error)}); a file of the "
            "official code has to be imported first: python -m training.convert import"
        ) from error
    if METADATA_KEY not in metadata:
        raise SettingError(
            f"{path}: no metadata in it; was it written by training/train.py, or by "
            "python -m training.convert import?"
        )
    try:
        record = json.loads(metadata[METADATA_KEY], parse_float=_finite, parse_constant=_finite)
        json.dumps(record, ensure_ascii=False).encode()  # half a character cannot be printed
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{path}: broken metadata (no JSON: {_short(error)})") from error
    if not isinstance(record, dict):
        raise SettingError(
            f"{path}: broken metadata (expected a mapping, found {type(record).__name__})"
        )
    version = record.get("schema_version", 0)
    if not isinstance(version, int):
        raise SettingError(f"{path}: broken metadata (schema_version {version!r}: is no number)")
    if version > SCHEMA:
        raise SettingError(
            f"{path}: metadata of schema {version}, this version reads up to {SCHEMA}; upgrade the "
            "package"
        )
    return record


def read_metadata(path: Path) -> WeightsMetadata:
    """The metadata of a weights file.

    Raises:
        SettingError: no such file, no safetensors, or no metadata of this version in it.
    """
    record = read_record(path)
    try:
        return WeightsMetadata.model_validate(record)
    except ValidationError as error:
        raise SettingError(f"{path}: broken metadata ({_first(error)})") from error


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex; read once for as long as the file stays the same."""
    stat = path.stat()
    # The clock behind the times ticks every few milliseconds; a file put in its place is another.
    return _hash(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


def _first(error: ValidationError) -> str:
    """The first of what is wrong, as "key: what"."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{where} is missing"
    message = _short(first["msg"].removeprefix("Value error, "))
    return f"{where}: {message}" if where else message


def _short(error: object) -> str:
    return " ".join(str(error).split())[:120]


@functools.lru_cache(16)
def _hash(path: Path, inode: int, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What a weights file says of itself, read without torch: where it is, its passport as JSON, its
content's hash."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.core.errors import SettingError

METADATA_KEY = "microdit"
SCHEMA = 2


def find(checkpoint: str) -> Path:
    """The weights file of a run's folder, or the file itself.

    Raises:
        SettingError: nothing there.
    """
    path = Path(checkpoint)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise SettingError(
            f"checkpoint {checkpoint}: no file {path}; a run writes it at the end of each stage"
        )
    return path


def read_record(path: Path) -> dict[str, Any]:
    """The passport of a weights file as it is written there.

    Raises:
        SettingError: no such file, no safetensors, or no passport of this version in it.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except OSError as error:
        raise SettingError(f"{path}: no such file") from error
    except SafetensorError as error:
        raise SettingError(
            f"{path}: no safetensors file, or a truncated one ({error}); a file of the official "
            "code has to be imported first: python -m training.convert import"
        ) from error
    if METADATA_KEY not in metadata:
        raise SettingError(
            f"{path}: no passport in it; was it written by training/train.py, or by "
            "python -m training.convert import?"
        )
    record = json.loads(metadata[METADATA_KEY])
    if record.get("schema_version", 0) > SCHEMA:
        raise SettingError(
            f"{path}: passport of schema {record['schema_version']}, this version reads up to "
            f"{SCHEMA}; upgrade the package"
        )
    return record


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex; read once for as long as the file stays the same."""
    stat = path.stat()
    # The clock behind the times ticks every few milliseconds; a file put in its place is another.
    return _hash(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(16)
def _hash(path: Path, inode: int, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

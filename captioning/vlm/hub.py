"""Where a model's files are: a folder, or the local cache of the Hugging Face hub. Never the
network, except in `fetch`: a job that runs for days does not find out later that it cannot load."""

from __future__ import annotations

import hashlib
from pathlib import Path

from captioning.captioner import BadSetting

# Safetensors only: a pickle may run code.
_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def model_folder(name: str, repo: str) -> tuple[Path, str]:
    """The folder with the files of `repo`, and the hub's commit ("" for a plain folder).

    Args:
        name: what the user wrote, for messages.
        repo: a folder, or a hub id with or without "@revision".

    Raises:
        BadSetting: it is not in the local cache, is no hub id, or lacks a file.
    """
    folder, commit = Path(repo), ""
    if not folder.is_dir():
        folder = _cached(name, repo)
        commit = folder.name
    if not (folder / "config.json").is_file():
        raise BadSetting(f"captioner={name}: {folder / 'config.json'} is missing")
    if not any((folder / weights).is_file() for weights in _WEIGHTS):
        raise BadSetting(
            f"captioner={name}: {folder / _WEIGHTS[0]} is missing; weights as pickles are not read"
        )
    return folder, commit


def fetch(repo: str) -> Path:
    """Downloads a hub repo into the local cache: the only function that uses the network."""
    from huggingface_hub import snapshot_download

    own, _, revision = repo.partition("@")
    return Path(snapshot_download(own, revision=revision or None, allow_patterns=_PATTERNS))


def files_hash(folder: Path) -> str:
    """16 hex digits over all that decides a model's output: weights, configs, tokenizer."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _cached(name: str, repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    own, _, revision = repo.partition("@")
    try:
        return Path(snapshot_download(own, revision=revision or None, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise BadSetting(
            f"captioner={name}: {repo} is not in the local hub cache; run `pipeline fetch {name}` "
            "where there is a network, or name a folder"
        ) from error
    except HFValidationError as error:
        raise BadSetting(f"captioner={name}: {repo} is no folder and no hub id") from error

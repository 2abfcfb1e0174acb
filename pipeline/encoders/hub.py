"""Where weights come from: a folder, or the local cache of the Hugging Face hub. Never the network,
except in `fetch`: a job that runs for days does not find out on day two that a download fails."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.core.errors import SettingError

# Weights as safetensors where they exist; never pickles of optimizers or other frameworks.
_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors", "open_clip_pytorch_model.bin"]


def folder_of(name: str, repo: str, subfolder: str = "") -> tuple[Path, str]:
    """The folder that holds the files of `repo`, and the revision ("" for a plain folder).

    Raises:
        SettingError: the hub repo is not in the local cache.
    """
    if Path(repo).is_dir():
        return Path(repo, subfolder), ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise SettingError(
            f"{name}: {repo} is not in the local hub cache; "
            f"run `pipeline fetch {name}` where there is a network"
        ) from error
    return Path(folder, subfolder), Path(folder).name


def fetch(repo: str, subfolder: str = "") -> Path:
    """Downloads a hub repo (or one subfolder of it) into the local cache."""
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    return Path(snapshot_download(repo, allow_patterns=[prefix + p for p in _PATTERNS]))


def weights_hash(folder: Path) -> str:
    """sha256 over the names and contents of the folder's weight files."""
    digest = hashlib.sha256()
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt"))
    for path in files:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else ""


def require_files(setting: str, folder: Path, *names: str) -> None:
    """Raises SettingError for the first file that the folder misses."""
    for name in names:
        if not (folder / name).is_file():
            raise SettingError(f"{setting}: {folder / name} is missing")

"""Where weights come from: a folder, or the local cache of the Hugging Face hub. Never the network,
except in `fetch`: a job that runs for days does not find out on day two that a download fails."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import SettingError, StorageError

# Weights as safetensors where they exist; never pickles of optimizers or other frameworks.
_PATTERNS = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.safetensors",
    "open_clip_pytorch_model.bin",
]


def is_hub_id(name: str) -> bool:
    """Whether it looks like "owner/name" or "owner/name@revision"."""
    return name.partition("@")[0].count("/") == 1 and not name.startswith((".", "/", "~"))


def split_revision(repo: str) -> tuple[str, str | None]:
    """ "owner/name@revision" -> its two parts; a folder may have an @ in its name."""
    if Path(repo).is_dir() or "@" not in repo:
        return repo, None
    repo, _, revision = repo.partition("@")
    return repo, revision


def folder_of(name: str, repo: str, subfolder: str = "") -> tuple[Path, str]:
    """The folder that holds the files of `repo`, and the revision ("" for a plain folder).

    Args:
        repo: a folder, a hub id, or a hub id with a branch, tag or commit: "owner/name@revision".

    Raises:
        SettingError: the hub repo is not in the local cache, or cannot be the name of one.
    """
    if Path(repo).is_dir():
        return Path(repo, subfolder), ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    own, revision = split_revision(repo)
    try:
        folder = snapshot_download(own, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise SettingError(
            f"{name}: {repo} is not in the local hub cache; "
            f"run `pipeline fetch {name}` where there is a network"
        ) from error
    except HFValidationError as error:
        raise SettingError(f"{name}: {repo} is no folder and no hub id") from error
    return Path(folder, subfolder), Path(folder).name


def fetch(repo: str, subfolder: str = "") -> Path:
    """Downloads a hub repo (or one subfolder of it) into the local cache."""
    from huggingface_hub import snapshot_download

    repo, revision = split_revision(repo)
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + pattern for pattern in _PATTERNS]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


@contextlib.contextmanager
def hub_errors(name: str, repo: str) -> Iterator[None]:
    """What a download can end with, as a line; no token and no signed link is in it.

    Raises:
        SettingError: no such model or revision, or it needs leave.
        StorageError: the hub does not answer, or the disk fails.
    """
    import requests
    from huggingface_hub import errors

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    page = f"{endpoint.rstrip('/')}/{repo.partition('@')[0]}"
    try:
        yield
    except errors.GatedRepoError:
        raise SettingError(
            f"fetch {name}: gated: accept its terms on {page}, then set HF_TOKEN to a token of "
            "that account (or run `hf auth login`)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise SettingError(
            f"fetch {name}: there is no such model, or it is private; see {page}; where it needs "
            "leave, set HF_TOKEN to the token of an account that has it"
        ) from None
    except errors.RevisionNotFoundError:
        raise SettingError(f"fetch {name}: no such revision; see {page}/commits/main") from None
    except errors.HFValidationError:
        raise SettingError(f"fetch {name}: is no folder and no hub id") from None
    except errors.OfflineModeIsEnabled:
        raise SettingError(f"fetch {name}: HF_HUB_OFFLINE=1 forbids it; unset it") from None
    except (requests.RequestException, errors.LocalEntryNotFoundError) as error:
        why = _reason(error)
        raise StorageError(
            f"fetch {name}: {endpoint} cannot be reached ({why}); run it where there is a network, "
            "or set HF_ENDPOINT to a mirror"
        ) from None
    except OSError as error:
        where = error.filename or os.environ.get("HF_HOME") or "~/.cache/huggingface"
        raise StorageError(
            f"fetch {name}: {where}: {error.strerror or type(error).__name__}; set HF_HOME to a "
            "folder that can be written and has room"
        ) from None


def _reason(error: BaseException) -> str:
    """The kind of the first error that led to this one, or the status that a server gave."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else type(error).__name__


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


def check_hash(setting: str, folder: Path, expected: str | None, found: str) -> None:
    """Raises SettingError where the weights are not those that a table has pinned."""
    if expected and found != expected:
        raise SettingError(
            f"{setting}: the weights in {folder} have sha256 {found}, the table of encoders says "
            f"{expected}"
        )


def require_files(setting: str, folder: Path, *names: str) -> None:
    """Raises SettingError for the first file that the folder misses."""
    for name in names:
        if not (folder / name).is_file():
            raise SettingError(f"{setting}: {folder / name} is missing")

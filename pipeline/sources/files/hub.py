"""Datasets of the Hugging Face hub: hf://datasets/OWNER/NAME@REVISION/PATH.

$HF_ENDPOINT and $HF_TOKEN (or `hf auth login`) are honoured as huggingface_hub does.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from pipeline.core.errors import SettingError
from pipeline.core.links import harmless
from pipeline.sources.files import resumable
from pipeline.sources.files.resumable import Facts, Interrupted, TransferError

T = TypeVar("T")
ATTEMPTS = 5  # of a question, while planning
COMMIT = re.compile(r"[0-9a-f]{40}")


class Address(NamedTuple):
    repo: str  # "owner/name"
    revision: str  # a branch, a tag or a commit
    path: str  # in the repo; "" for the repo itself


class Link(NamedTuple):
    url: str
    headers: dict[str, str]  # the token's: for the hub's own host alone
    facts: Facts


def parse(url: str) -> Address:
    """
    Raises:
        SettingError: not of the form hf://datasets/OWNER/NAME[@REVISION]/PATH.
    """
    found = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", url)
    if found is None:
        raise SettingError(f"{url}: write hf://datasets/OWNER/NAME/PATH, or …/NAME@REVISION/PATH")
    return Address(found[1], (found[2] or "main").replace("%2F", "/"), found[3] or "")


def address(repo: str, revision: str, path: str) -> str:
    """hf://datasets/OWNER/NAME@REVISION/PATH."""
    return f"hf://datasets/{repo}@{revision.replace('/', '%2F')}/{path}"


def commit(repo: str, revision: str = "main") -> str:
    """The commit that a branch or tag of a dataset stands for now: 40 hex digits.

    One request; none where `revision` is a commit already.

    Raises:
        SettingError: no such dataset or revision, or it needs leave.
    """
    if COMMIT.fullmatch(revision):
        return revision

    def ask() -> str:
        with _explained(repo, revision):
            sha = _api().dataset_info(repo, revision=revision, timeout=30).sha
            if sha is None:
                raise Interrupted("the hub names no commit")
            return sha

    return patiently(repo, ask)


def files(repo: str, revision: str, folder: str = "") -> list[str]:
    """Paths of all files of a dataset, or below one folder of it, sorted.

    Raises:
        SettingError: no such dataset or revision, or it needs leave.
    """
    from huggingface_hub.hf_api import RepoFile

    def ask() -> list[str]:
        with _explained(repo, revision, folder):
            tree = _api().list_repo_tree(
                repo, folder or None, recursive=True, revision=revision, repo_type="dataset"
            )
            return sorted(entry.path for entry in tree if isinstance(entry, RepoFile))

    return patiently(repo, ask)


def patiently(repo: str, ask: Callable[[], T]) -> T:
    """What the hub answers in the end, to a plan; a transfer tries again by itself.

    Raises:
        SettingError: it does not, or has nothing of the kind.
    """
    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except Interrupted as error:
            if attempt == ATTEMPTS - 1:
                raise SettingError(
                    f"{repo}: the hub cannot be asked: {error}; try again, or give a commit for "
                    "the revision, of which nothing has to be asked"
                ) from None
            time.sleep(
                min(max(resumable.BACKOFF_S * 2**attempt, error.after_s), resumable.LONGEST_S)
            )
        except TransferError as error:
            raise SettingError(str(error)) from None
    raise SettingError(f"{repo}: the hub cannot be asked")


def link(url: str) -> Link:
    """Where a file's bytes are, and what the hub says of them: one request.

    Raises:
        SettingError: the dataset needs leave, or is not there.
        TransferError: it has no such file. Interrupted: ask again.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url

    repo, revision, path = parse(url)
    where = hf_hub_url(repo, path, repo_type="dataset", revision=revision, endpoint=_endpoint())
    token = get_token() or False
    with _explained(repo, revision, path):
        found = get_hf_file_metadata(where, token=token, timeout=30, endpoint=_endpoint())
    etag = found.etag or ""
    # Of a large file (LFS) the hub gives the content's sha256 for an ETag; of others git's hash.
    checksum = f"sha256:{etag}" if re.fullmatch(r"[0-9a-f]{64}", etag) else ""
    version = etag if checksum else f"{found.commit_hash}/{etag}"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return Link(where, headers, Facts(found.size, version, checksum))


def _endpoint() -> str | None:
    """The hub to ask. huggingface_hub reads the variable when it is imported, and not again."""
    return os.environ.get("HF_ENDPOINT") or None


def _api():
    from huggingface_hub import HfApi, get_token

    return HfApi(endpoint=_endpoint(), token=get_token() or False)


@contextlib.contextmanager
def _explained(repo: str, revision: str, path: str = "") -> Iterator[None]:
    """The hub's refusals in one line each. No token and no signed link is in them."""
    import requests
    from huggingface_hub import errors

    from pipeline.sources.files.transfer_http import retry_after

    page = f"{(_endpoint() or 'https://huggingface.co').rstrip('/')}/datasets/{repo}"
    try:
        yield
    except errors.GatedRepoError:
        raise SettingError(
            f"{repo} is gated: accept its terms on {page}, then set HF_TOKEN to a token of that "
            "account (or run `hf auth login`)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise SettingError(
            f"{repo}: there is no such dataset, or it is private or gated; see {page}; where it "
            "needs leave, set HF_TOKEN to the token of an account that has it"
        ) from None
    except errors.RevisionNotFoundError:
        raise SettingError(f"{repo}: no revision {revision}; see {page}/commits/main") from None
    except errors.EntryNotFoundError:
        raise TransferError(f"{repo}@{revision}: no file {path}") from None
    except errors.OfflineModeIsEnabled:
        raise SettingError(f"{repo}: HF_HUB_OFFLINE=1 forbids to ask the hub; unset it") from None
    except errors.HFValidationError:
        raise SettingError(f"{repo}: is no name of a dataset; write OWNER/NAME") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise SettingError(
                f"{repo}: the hub refuses (HTTP {status}); check HF_TOKEN, and that its account "
                f"may read {page}"
            ) from None
        if 400 <= status < 500 and status not in (408, 429):
            raise TransferError(f"{repo}@{revision}: {path}: HTTP {status}") from None
        asked = retry_after(error.response.headers) if error.response is not None else 0.0
        raise Interrupted(f"the hub answers with HTTP {status}", asked) from None
    except (requests.RequestException, errors.FileMetadataError) as error:
        raise Interrupted(f"{type(error).__name__}: {harmless(str(error))}") from None

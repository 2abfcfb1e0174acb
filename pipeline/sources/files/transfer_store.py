"""One attempt to fetch, or go on fetching, a large file from an object store, through fsspec."""

from __future__ import annotations

import base64
from typing import Any

from pipeline.core import remote
from pipeline.core.errors import SettingError
from pipeline.core.links import harmless, public
from pipeline.sources.files.resumable import (
    COUNTERS,
    Changed,
    Facts,
    Interrupted,
    Transfer,
    TransferError,
)

BLOCK = 32 << 20  # bytes of one request: what a cut connection costs


def fetch(job: Transfer, url: str, protocol: str) -> None:
    """Appends to the job's file what is missing of it.

    Raises:
        Interrupted, Changed, TransferError; SettingError where no client knows the protocol.
    """
    try:
        fs = remote.connect(url, protocol)
    except SettingError as error:
        raise SettingError(str(error).replace("--root ", "", 1)) from None
    have, known = job.resumable()
    facts = _facts(fs, url)
    if have and facts.version != known.version:
        raise Changed("upstream has another version now")
    if facts.size is None:
        raise TransferError(f"{public(url)}: its store does not say how long it is")
    with job.begin(facts, have) as file:
        while have < facts.size:
            end = min(have + BLOCK, facts.size)
            block = _asked(url, fs.cat_file, url, start=have, end=end, **remote.reading(protocol))
            if len(block) != end - have:
                raise Interrupted(f"{len(block)} of {end - have} bytes came")
            file.write(block)
            have = end
            COUNTERS["bytes transferred"] += len(block)
    if _facts(fs, url) != facts:
        raise Changed("upstream changed it meanwhile")


def _facts(fs: Any, url: str) -> Facts:
    row = _asked(url, fs.info, url)
    if row["type"] != "file":
        raise TransferError(f"{public(url)}: is a folder")
    version = row.get("ETag") or row.get("etag") or row.get("LastModified") or row.get("mtime")
    md5 = row.get("md5Hash")  # Google's, of objects written in one piece
    checksum = f"md5:{base64.b64decode(md5).hex()}" if md5 else ""
    return Facts(int(row["size"]), str(version or row.get("created") or ""), checksum)


def _asked(url: str, method: Any, *args: Any, **options: Any) -> Any:
    """What a client says; its errors, which have no common base, as ours."""
    try:
        return method(*args, **options)
    except (FileNotFoundError, NotADirectoryError):
        raise TransferError(f"{public(url)}: there is no such file") from None
    except PermissionError as error:
        raise TransferError(
            f"{public(url)}: {harmless(str(error)) or 'permission denied'}; check the credentials"
        ) from None
    except Exception as error:
        name = type(error).__name__
        if name in ("NoCredentialsError", "PartialCredentialsError"):  # botocore's
            raise TransferError(
                f"{public(url)}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
        raise Interrupted(f"{name}: {harmless(str(error))}") from None

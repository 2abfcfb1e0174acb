"""Large files of upstream, whole, on this machine's disk: begun again where they broke off.

A file lies in the scratch folder under a name of its own, beside a record of what upstream said of
it (length, version, checksum) when its first byte came. What is there is continued by whoever asks
next, also after a kill; what upstream has changed since, or what came in another length or with
another checksum, is fetched anew. Nobody sees a file that is not whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import StorageError
from pipeline.core.links import last_part
from pipeline.core.location import located
from pipeline.core.staged_file import SCRATCH_VARIABLE, scratch
from pipeline.sources.files.resumable import Facts, Transfer, TransferError
from pipeline.sources.files.scratch_files import locked, remove


@contextlib.contextmanager
def local(
    url: str, *, checksum: str = "", identity: str = "", keep: bool = False
) -> Iterator[Path]:
    """The whole file on a local disk, while the block runs:

        with transfer.local("hf://datasets/owner/name@3f2a…/data/0001.tar") as path:
            ...

    A path or file:// URL is read where it lies. http(s)://, hf://datasets/ and whatever fsspec
    knows (s3://, gs://, …) is fetched to the scratch folder. Of several processes that want the
    same file one fetches it, and the others wait.

    Args:
        url: may hold secrets in its query; they appear in no name, record or message.
        checksum: "sha256:HEX" or "md5:HEX", where the caller knows it; else upstream's, if any.
        identity: what is the same for all URLs of this very file, where its URL changes (links
            that are signed anew). Default: the URL.
        keep: leave it in the scratch folder, for other shards on this host. Else it goes when the
            block ends, whether by an error or not; only a kill leaves it, for the next attempt.

    Raises:
        TransferError: it is not there, is refused, or does not come whole.
        SettingError: a hub dataset that needs leave, or a URL of no known kind.
        StorageError: the scratch folder is full or cannot be written.
    """
    if "://" not in url or url.startswith("file://"):
        path = Path(located(url).removeprefix("file://"))
        if not path.is_file():
            raise TransferError(f"{path}: there is no such file")
        yield path
        return
    folder = scratch()
    digest = hashlib.blake2b((identity or url).encode(), digest_size=8).hexdigest()
    # A readable end, for people who look into the folder; of odd characters none.
    target = folder / f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', last_part(url))[-80:]}"
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(locked(target))
        with _explained(folder):
            Transfer(url, target, checksum, _attempt).run()
        if keep:
            os.utime(target)  # in use: see remove_abandoned
            lock.close()  # nobody changes a whole file: it is replaced, if at all
            yield target
            return
        try:
            yield target
        finally:
            remove(target)


def stamped(url: str) -> str:
    """A URL for a name of its content; of a local file with size and date."""
    if "://" in url:
        return url
    with contextlib.suppress(OSError):
        status = os.stat(url)
        return f"{url} {status.st_size} {status.st_mtime_ns}"
    return url


def _attempt(job: Transfer) -> None:
    from pipeline.sources.files import hub, transfer_http, transfer_store  # and their clients

    protocol = job.url.split("://")[0]
    if protocol == "hf":
        link = hub.link(job.url)
        transfer_http.fetch(job, link.url, link.headers, link.facts)
    elif protocol in ("http", "https"):
        transfer_http.fetch(job, job.url, {}, Facts())
    else:
        transfer_store.fetch(job, job.url, protocol)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """The scratch folder's own failures concern every shard on this host."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise StorageError(
            f"{folder}: {error.strerror}; mend it, or set {SCRATCH_VARIABLE} to another folder"
        ) from None

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
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from pipeline.core.disk import second_name
from pipeline.core.errors import StorageError
from pipeline.core.location import located
from pipeline.core.staged_file import SCRATCH_VARIABLE, scratch
from pipeline.core.store import size as readable
from pipeline.sources.files.scratch_files import locked, record_of, remove, require_space

ATTEMPTS = 8  # in a row that bring no new byte
BACKOFF_S = 1.0  # before the second attempt; doubles, up to LONGEST_S
LONGEST_S = 60.0

#: What transfers did in this process since somebody last took it: bytes, files, resumptions.
COUNTERS: Counter[str] = Counter()


class TransferError(RuntimeError):
    """A file that cannot be had, now or ever; it concerns the shards that need it.

    Never chained to the error it comes from: those of HTTP clients name whole URLs, signature and
    all, and Ray prints the chain.
    """


class Interrupted(Exception):
    """It may go better on the next attempt, where this one stopped."""

    def __init__(self, why: str, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.after_s = after_s  # upstream asks not to be asked before


class Changed(Exception):
    """What came so far is not part of what upstream has now: from the start again."""


@dataclass(frozen=True)
class Facts:
    """What upstream says of a file. Unknown parts are empty."""

    size: int | None = None  # bytes
    version: str = ""  # an ETag, or whatever changes with the content
    checksum: str = ""  # "sha256:…" or "md5:…", in hex


def take_counters() -> Counter[str]:
    """What transfers did since the last call, for a worker's own counters."""
    taken = Counter(COUNTERS)
    COUNTERS.clear()
    return taken


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
    target = folder / f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', _last_part(url))[-80:]}"
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(locked(target))
        with _explained(folder):
            Transfer(url, target, checksum).run()
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


def public(url: str) -> str:
    """A URL without what may be secret: user, query and fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def harmless(text: str) -> str:
    """A client's message in one line, without the queries and users of the URLs in it."""
    line = " ".join(text.split())
    return re.sub(r"\?[^\s'\")>]*", "?…", re.sub(r"//[^/\s@]*@", "//", line))[:300]


class Transfer:
    """One file's way to the scratch folder, by whoever holds its lock."""

    def __init__(self, url: str, target: Path, checksum: str) -> None:
        self.url, self.target, self.checksum = url, target, checksum
        self.part = target.with_name(target.name + ".part")
        self.record = record_of(target)
        self.facts = self._recorded()

    def run(self) -> None:
        if self.target.exists() and self.facts is not None:
            # Whole already, and upstream is asked whether still so. A second name of the file, for
            # others may be reading it under its first one.
            self.part.unlink(missing_ok=True)
            second_name(self.target, self.part)
        failed, mismatches = 0, 0
        most = (
            self._have()
        )  # bytes that were here at once: where there are no ranges, they go again
        while True:
            try:
                self._attempt()
                self._check()
                break
            except Interrupted as error:
                failed = 1 if self._have() > most else failed + 1
                most = max(most, self._have())
                if failed > ATTEMPTS:
                    raise TransferError(
                        f"{public(self.url)}: {error}; given up after {failed} attempts with "
                        f"{readable(self._have())} here; a rerun goes on from there"
                    ) from None
                COUNTERS["transfers interrupted"] += 1
                pause = BACKOFF_S * 2 ** (failed - 1) * random.uniform(0.5, 1.0)
                time.sleep(min(max(pause, error.after_s), LONGEST_S))
            except Changed as error:
                self._forget()
                COUNTERS["transfers begun anew"] += 1
                most = 0
                mismatches += 1
                if mismatches > 2:
                    raise TransferError(f"{public(self.url)}: {error}, three times") from None
        with open(self.part, "rb") as file:
            os.fsync(file.fileno())
        if self.target.exists() and self.target.samefile(self.part):
            self.part.unlink()  # renaming a file to itself does nothing
            return
        os.replace(self.part, self.target)
        COUNTERS["files transferred"] += 1

    def _attempt(self) -> None:
        from pipeline.sources.files import transfer_http, transfer_store

        protocol = self.url.split("://")[0]
        if protocol == "hf":
            from pipeline.sources.files import hub

            link = hub.link(self.url)
            transfer_http.fetch(self, link.url, link.headers, link.facts)
        elif protocol in ("http", "https"):
            transfer_http.fetch(self, self.url, {}, Facts())
        else:
            transfer_store.fetch(self, self.url, protocol)

    def begin(self, facts: Facts, offset: int) -> IO[bytes]:
        """The file to append to, where `offset` bytes are there, 0 or all that are.

        Called once upstream has said what it has, before the first byte.
        """
        if offset == 0:
            if self.checksum:
                facts = replace(facts, checksum=self.checksum)
            self._forget()
            temporary = self.record.with_name(self.record.name + ".new")
            temporary.write_text(json.dumps(asdict(facts)))
            os.replace(temporary, self.record)
            self.facts = facts
        else:
            COUNTERS["transfers resumed"] += 1
        if facts.size is not None:
            require_space(self.target.parent, facts.size - offset, _last_part(self.url))
        return open(self.part, "ab")

    def resumable(self) -> tuple[int, Facts]:
        """How many bytes are there, and of what; 0 where that is not known well enough."""
        have = self._have()
        if self.facts is None or self.facts.size is None or have > self.facts.size:
            return 0, Facts()
        return have, self.facts

    def _check(self) -> None:
        """The length and the checksum of what came.

        Raises:
            Interrupted: it is too short. Changed: it is not what upstream said.
        """
        if self.facts is None:
            raise Interrupted("nothing came")
        have, expected = self._have(), self.facts.size
        if expected is not None and have < expected:
            raise Interrupted(f"{have} of {expected} bytes came")
        if expected is not None and have > expected:
            raise Changed(f"{have} bytes came, {expected} were announced")
        algorithm, _, wanted = self.facts.checksum.partition(":")
        if wanted:
            with open(self.part, "rb") as file:
                found = hashlib.file_digest(file, algorithm).hexdigest()
            if found != wanted:
                raise Changed(f"{algorithm} is {found}, upstream says {wanted}")

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)
        self.facts = None

    def _recorded(self) -> Facts | None:
        try:
            return Facts(**json.loads(self.record.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def _last_part(url: str) -> str:
    return urlsplit(url).path.rstrip("/").rpartition("/")[2] or "file"


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

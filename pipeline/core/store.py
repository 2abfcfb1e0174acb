"""Files of a data root, local or remote, written whole or not at all.

A root is a path or any fsspec URL. Local files appear by rename of a fully written, synced
temporary file; on an object store one PUT (or completed multipart upload) is atomic by itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.core import process, remote
from pipeline.core.disk import sync_folder
from pipeline.core.errors import StorageError

TEMPORARY = ".tmp-"  # marks a file in the making; its process and a random part follow


class Entry(NamedTuple):
    """A file as a listing shows it."""

    path: str  # relative to the root
    bytes: int
    version: str  # changes when the file is replaced; "" where the store does not tell


class Store:
    """Atomic whole-file access below one root; paths are relative, with forward slashes.

    Every method raises StorageError, with path and remedy, where the root itself fails; a file
    that is not there is a FileNotFoundError, or an empty answer of the listing methods.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = str(root).rstrip("/") or "/"
        protocol = self.root.split("://")[0] if "://" in self.root else "file"
        self.local = protocol == "file"
        self._fs: Any = None
        if self.local:
            self.root = str(Path(self.root.removeprefix("file://")).absolute())
        else:
            self._fs = remote.connect(self.root, protocol)
            self._reading = remote.reading(protocol)

    def url(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def exists(self, path: str) -> bool:
        with self.explained(path, "read"):
            if self._fs is None:
                return _stat(self.url(path)) is not None
            return self._fs.exists(self.url(path))

    def entries(self, folder: str) -> list[Entry]:
        """The files in a folder, by name; empty where there is no such folder."""
        with self.explained(folder, "read"):
            try:
                if self._fs is None:
                    found = [
                        Entry(f"{folder}/{e.name}".lstrip("/"), s.st_size, str(s.st_mtime_ns))
                        for e in os.scandir(self.url(folder))
                        if e.is_file() and TEMPORARY not in e.name and (s := _stat(e.path))
                    ]
                else:
                    rows = remote.listing(self._fs, self.url(folder))
                    found = [self._entry(row) for row in rows if remote.is_file(row)]
            except _ABSENT as error:
                _require_bucket(error)
                return []
        return sorted(found)

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; empty where there is no such folder."""
        if self._fs is None:  # without asking for the size of each: thousands of commits
            with self.explained(folder, "read"):
                try:
                    found = [e.name for e in os.scandir(self.url(folder)) if e.is_file()]
                except _ABSENT:
                    return []
            return sorted(name for name in found if TEMPORARY not in name)
        return [entry.path.rsplit("/", 1)[-1] for entry in self.entries(folder)]

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted."""
        with self.explained(folder, "read"):
            try:
                if self._fs is None:
                    return sorted(e.name for e in os.scandir(self.url(folder)) if e.is_dir())
                rows = remote.listing(self._fs, self.url(folder))
            except _ABSENT as error:
                _require_bucket(error)
                return []
        return sorted(
            row["name"].rstrip("/").rsplit("/", 1)[1] for row in rows if row["type"] == "directory"
        )

    def walk(self, folder: str) -> Iterator[Entry]:
        """Every file below a folder, temporary ones included."""
        with self.explained(folder, "read"):
            if self._fs is None:
                for path in sorted(_files(self.url(folder))):
                    if stat := _stat(path):
                        name = os.path.relpath(path, self.root)
                        yield Entry(name, stat.st_size, str(stat.st_mtime_ns))
                return
            try:
                rows = self._fs.find(self.url(folder), detail=True)
            except _ABSENT as error:
                _require_bucket(error)
                return
        yield from sorted(self._entry(row) for row in rows.values() if remote.is_file(row))

    def read(self, path: str) -> bytes:
        with self.explained(path, "read"):
            if self._fs is None:
                return Path(self.url(path)).read_bytes()
            return self._fs.cat_file(self.url(path), **self._reading)

    def read_many(self, paths: list[str]) -> Iterator[bytes | None]:
        """Small files, in order, None for one that is not there; on an object store many requests
        are under way at once."""
        for start in range(0, len(paths), _REQUESTS):
            some = paths[start : start + _REQUESTS]
            if self._fs is None:
                yield from map(self._read_if_there, some)
                continue
            # One by one, each from a thread: a client's own way to read several takes names with
            # [1], * or ? for patterns.
            with ThreadPoolExecutor(min(len(some), remote.CONNECTIONS)) as threads:
                yield from threads.map(self._read_if_there, some)

    def _read_if_there(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        """The file appears whole, under its final name, or not at all."""
        with self.explained(path, "write", len(data)):
            if self._fs is not None:
                self._fs.pipe_file(self.url(path), data)
                return
            with _appearing(Path(self.url(path))) as file:
                file.write(data)

    def place(self, source: Path, path: str) -> None:
        """A finished file of pipeline.core.staged_file gets its final name."""
        if self._fs is not None:
            self.upload(source, path)
            return
        with self.explained(path, "write"):
            target = Path(self.url(path))
            with open(source, "rb") as file:
                os.fsync(file.fileno())
            os.replace(source, target)
            sync_folder(target.parent)

    def upload(self, source: Path, path: str) -> None:
        """A copy of a local file of any size appears whole, under its final name, or not at all."""
        with self.explained(path, "write", source.stat().st_size if source.exists() else 0):
            if self._fs is not None:
                self._fs.put_file(str(source), self.url(path))
                return
            with open(source, "rb") as data, _appearing(Path(self.url(path))) as file:
                shutil.copyfileobj(data, file, _BLOCK)

    def download(self, path: str, target: Path) -> None:
        """A file of any size appears whole under a local name, or not at all."""
        with self.explained(path, "read"), _appearing(target) as file:
            if self._fs is None:
                with open(self.url(path), "rb") as data:
                    shutil.copyfileobj(data, file, _BLOCK)
                return
            self._fs.get_file(self.url(path), file.name)
            expected, found = self._fs.size(self.url(path)), os.path.getsize(file.name)
            if expected != found:
                raise OSError(f"{found} of {expected} bytes came")

    def delete(self, path: str) -> None:
        """Deletes a file; nothing happens where there is none."""
        with self.explained(path, "write"), contextlib.suppress(FileNotFoundError):
            if self._fs is None:
                os.unlink(self.url(path))
            else:
                self._fs.rm_file(self.url(path))

    def remove_empty(self, folder: str) -> None:
        """Deletes a folder that holds nothing, and those above it that then hold nothing, up to
        the root; an object store has no folders."""
        if self._fs is None:
            with contextlib.suppress(OSError):
                while folder:
                    os.rmdir(self.url(folder))
                    folder = folder.rpartition("/")[0]

    def read_json(self, path: str) -> Any:
        return json.loads(self.read(path))

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, canonical_json(value, indent=1) + b"\n")

    def remove_leftovers(self, folder: str, alone: bool = False) -> int:
        """Deletes files in the making whose process on this host is gone; how many.

        Args:
            alone: nobody else writes here, so those of other hosts are dead as well.
        """
        if self._fs is not None:
            return 0  # an object store shows no half-written object
        removed = 0
        with self.explained(folder, "write"):
            for path in Path(self.url(folder)).glob(f".*{TEMPORARY}*"):
                who = path.name.split(TEMPORARY)[1].rpartition("-")[0]
                if process.is_dead(who) or (alone and not process.is_here(who)):
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def free_bytes(self) -> int | None:
        """What the file system, or the quota it reports, leaves; None on an object store."""
        if self._fs is not None:
            return None
        with self.explained("", "read"):
            folder = Path(self.root)
            while not folder.exists():
                folder = folder.parent
            return shutil.disk_usage(folder).free

    def _entry(self, row: dict[str, Any]) -> Entry:
        path = row["name"]
        root = self.root.split("://", 1)[1].strip("/")
        version = row.get("ETag") or row.get("md5Hash") or row.get("etag") or ""
        return Entry(path.strip("/").removeprefix(root).lstrip("/"), row["size"], version)

    @contextlib.contextmanager
    def explained(self, path: str, verb: str, need: int = 0) -> Iterator[None]:
        """What the file system or the store raises inside becomes a StorageError with a remedy."""
        try:
            yield
        except _ABSENT as error:
            if verb == "read" and not remote.is_missing_bucket(error):
                raise
            remedy = (
                "; create it, or choose another --root" if remote.is_missing_bucket(error) else ""
            )
            raise StorageError(
                f"cannot {verb} {self.url(path)}: {_first_line(error)}{remedy}"
            ) from error
        except OSError as error:
            raise StorageError(self._explain(path, verb, need, error)) from error
        except Exception as error:
            # What a client library raises is its own affair: botocore's errors are no OSErrors.
            if self._fs is None:
                raise
            raise StorageError(self._explain(path, verb, need, error)) from error

    def _explain(self, path: str, verb: str, need: int, error: Exception) -> str:
        code = getattr(error, "errno", None)
        where = f"cannot {verb} {self.url(path)}"
        if code == errno.ENOSPC:
            return (
                f"{where}: disk full: {size(need)} needed, {size(self.free_bytes() or 0)} free; "
                "free some space, then run the same command again"
            )
        if code == errno.EDQUOT:  # what the disk has free says nothing about it
            return (
                f"{where}: disk quota of uid {os.getuid()} exceeded: {size(need)} needed; free "
                "some space or have it raised, then run the same command again"
            )
        if code == errno.EROFS:
            return f"{where}: read-only file system; mount it writable or choose another --root"
        if isinstance(error, PermissionError):
            who = f"uid {os.getuid()} has" if self.local else "the credentials in use have"
            mend = "run as its owner" if self.local else "check them"
            return (
                f"{where}: permission denied: {who} no right to {verb} here; {mend}, or choose "
                "another --root"
            )
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):  # botocore's
            return f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return (
            f"{where}: {_first_line(error)}"
            + (f" ({size(need)} to write)" if need else "")
            + ("; once it works again, " if self.local else "; once the store answers again, ")
            + "run the same command again"
        )


_BLOCK = 1 << 22  # bytes copied at once
_REQUESTS = 256  # files that read_many asks for at once, and holds in memory
_ABSENT = (FileNotFoundError, NotADirectoryError)


def temporary_name(name: str) -> str:
    return f".{name}{TEMPORARY}{process.identity()}-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[IO[bytes]]:
    """A file in the making, which gets its name when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(temporary_name(target.name))
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def canonical_json(value: Any, indent: int | None = None) -> bytes:
    """Equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fingerprint(inputs: Any) -> str:
    """16 hex digits over everything that decides a shard's bytes."""
    return sha256(canonical_json(inputs))[:16]


def size(count: float) -> str:
    """Bytes for people: 12 B, 3.4 MB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _first_line(error: BaseException) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0]


def _require_bucket(error: Exception) -> None:
    """Nothing is in a folder that is not there; but a bucket that is not there is a mistake."""
    if remote.is_missing_bucket(error):
        raise error


def _stat(path: str) -> os.stat_result | None:
    """None for a file that is not there, or was deleted since the listing."""
    try:
        return os.stat(path)
    except _ABSENT:
        return None


def _files(folder: str) -> Iterator[str]:
    """Every file below; a folder that cannot be read is an error, one that is gone is not."""

    def refused(error: OSError) -> None:
        if not isinstance(error, _ABSENT):
            raise error

    for path, _, names in os.walk(folder, onerror=refused):
        yield from (os.path.join(path, name) for name in names)

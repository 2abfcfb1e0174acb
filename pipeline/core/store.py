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
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core import process
from pipeline.core.errors import SettingError, StorageError

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
            self._fs = _filesystem(self.root, protocol)

    def url(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def exists(self, path: str) -> bool:
        with self._explained(path, "read"):
            if self._fs is None:
                return os.path.exists(self.url(path))
            return self._fs.exists(self.url(path))

    def entries(self, folder: str) -> list[Entry]:
        """The files in a folder, by name; empty where there is no such folder."""
        with self._explained(folder, "read"):
            try:
                if self._fs is None:
                    found = [
                        Entry(f"{folder}/{e.name}".lstrip("/"), s.st_size, str(s.st_mtime_ns))
                        for e in os.scandir(self.url(folder))
                        if e.is_file() and TEMPORARY not in e.name and (s := e.stat())
                    ]
                else:
                    rows = self._fs.ls(self.url(folder), detail=True)
                    found = [self._entry(row) for row in rows if row["type"] == "file"]
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(found)

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; empty where there is no such folder."""
        if self._fs is None:  # without asking for the size of each: thousands of commits
            with self._explained(folder, "read"):
                try:
                    found = [e.name for e in os.scandir(self.url(folder)) if e.is_file()]
                except (FileNotFoundError, NotADirectoryError):
                    return []
            return sorted(name for name in found if TEMPORARY not in name)
        return [entry.path.rsplit("/", 1)[-1] for entry in self.entries(folder)]

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted."""
        with self._explained(folder, "read"):
            try:
                if self._fs is None:
                    return sorted(e.name for e in os.scandir(self.url(folder)) if e.is_dir())
                rows = self._fs.ls(self.url(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(
            row["name"].rstrip("/").rsplit("/", 1)[1] for row in rows if row["type"] == "directory"
        )

    def walk(self, folder: str) -> Iterator[Entry]:
        """Every file below a folder, temporary ones included."""
        with self._explained(folder, "read"):
            if self._fs is None:
                for path in sorted(Path(self.url(folder)).rglob("*")):
                    if path.is_file():
                        stat = path.stat()
                        name = str(path.relative_to(self.root))
                        yield Entry(name, stat.st_size, str(stat.st_mtime_ns))
                return
            rows = self._fs.find(self.url(folder), detail=True)
        yield from sorted(self._entry(row) for row in rows.values())

    def read(self, path: str) -> bytes:
        with self._explained(path, "read"):
            if self._fs is None:
                return Path(self.url(path)).read_bytes()
            return self._fs.cat_file(self.url(path))

    def read_many(self, paths: list[str]) -> Iterator[bytes]:
        """Small files, in order; on an object store many requests are under way at once."""
        if self._fs is None:
            yield from map(self.read, paths)
            return
        for start in range(0, len(paths), _REQUESTS):
            urls = [self.url(path) for path in paths[start : start + _REQUESTS]]
            with self._explained(paths[start], "read"):
                found = self._fs.cat(urls)
            yield from (found[self._fs._strip_protocol(url)] for url in urls)

    def write(self, path: str, data: bytes) -> None:
        """The file appears whole, under its final name, or not at all."""
        with self._explained(path, "write", len(data)):
            if self._fs is not None:
                self._fs.pipe_file(self.url(path), data)
                return
            target = Path(self.url(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(temporary_name(target.name))
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(target.parent)

    def delete(self, path: str) -> None:
        """Deletes a file; nothing happens where there is none."""
        with self._explained(path, "write"), contextlib.suppress(FileNotFoundError):
            if self._fs is None:
                os.unlink(self.url(path))
            else:
                self._fs.rm_file(self.url(path))

    def remove_empty(self, folder: str) -> None:
        """Deletes a folder that holds nothing; an object store has none."""
        if self._fs is None:
            with contextlib.suppress(OSError):
                os.rmdir(self.url(folder))

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
        with self._explained(folder, "write"):
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
    def _explained(self, path: str, verb: str, need: int = 0) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            if verb == "read":
                raise
            raise StorageError(f"cannot write {self.url(path)}: {_first_line(error)}") from error
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
        if code in (errno.ENOSPC, errno.EDQUOT):
            what = "disk full" if code == errno.ENOSPC else "disk quota exceeded"
            free = self.free_bytes()
            return (
                f"{where}: {what}: {size(need)} needed, {size(free or 0)} free; free some space, "
                "then run the same command again"
            )
        if code == errno.EROFS:
            return f"{where}: read-only file system; mount it writable or choose another --root"
        if isinstance(error, PermissionError):
            who = f"uid {os.getuid()} has" if self.local else "the credentials in use have"
            return f"{where}: permission denied: {who} no right to {verb} here"
        return (
            f"{where}: {_first_line(error)}"
            + (f" ({size(need)} to write)" if need else "")
            + "; once the store answers again, run the same command again"
        )


_REQUESTS = 256  # under way at once, and held in memory, by read_many


def _filesystem(root: str, protocol: str) -> Any:
    import fsspec

    try:
        # Listings are asked for to see what others wrote a moment ago: never from a cache.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        extra = {"s3": "s3", "gs": "gs", "gcs": "gs"}.get(protocol)
        remedy = f"; install the extra: pip install microdit[{extra}]" if extra else ""
        raise SettingError(f"--root {root}: {_first_line(error)}{remedy}") from error


def temporary_name(name: str) -> str:
    return f".{name}{TEMPORARY}{process.identity()}-{uuid.uuid4().hex[:8]}"


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
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Files of a data root, local or remote, written whole or not at all.

A root is a path or any fsspec URL. Local files appear by rename of a fully written, synced
temporary file; on an object store one PUT (or completed multipart upload) is atomic by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import uuid
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"  # marks a file in the making; host, process and a random part follow


class Store:
    """Atomic whole-file access below one root; paths are relative, with forward slashes."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = str(root).rstrip("/") or "/"
        protocol = self.root.split("://")[0] if "://" in self.root else "file"
        self.local = protocol == "file"
        if self.local:
            self.root = str(Path(self.root.removeprefix("file://")).absolute())
            self._fs = None
        else:
            import fsspec

            self._fs = fsspec.filesystem(protocol)

    def url(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def exists(self, path: str) -> bool:
        if self._fs is None:
            return os.path.exists(self.url(path))
        return self._fs.exists(self.url(path))

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; empty where there is no such folder."""
        if self._fs is None:
            try:
                found = [entry.name for entry in os.scandir(self.url(folder)) if entry.is_file()]
            except FileNotFoundError:
                return []
            return sorted(name for name in found if TEMPORARY not in name)
        try:
            rows = self._fs.ls(self.url(folder), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(row["name"].rsplit("/", 1)[1] for row in rows if row["type"] == "file")

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted."""
        if self._fs is None:
            try:
                return sorted(e.name for e in os.scandir(self.url(folder)) if e.is_dir())
            except FileNotFoundError:
                return []
        try:
            rows = self._fs.ls(self.url(folder), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(
            row["name"].rstrip("/").rsplit("/", 1)[1] for row in rows if row["type"] == "directory"
        )

    def read(self, path: str) -> bytes:
        if self._fs is None:
            return Path(self.url(path)).read_bytes()
        return self._fs.cat_file(self.url(path))

    def write(self, path: str, data: bytes) -> None:
        """The file appears whole, under its final name, or not at all."""
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

    def read_json(self, path: str) -> Any:
        return json.loads(self.read(path))

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, canonical_json(value, indent=1) + b"\n")

    def remove_leftovers(self, folder: str) -> int:
        """Deletes temporary files in a folder whose process on this host is gone; how many."""
        if self._fs is not None:
            return 0  # an object store shows no half-written object
        removed = 0
        for path in Path(self.url(folder)).glob(f"*{TEMPORARY}*"):
            host, pid, _ = path.name.split(TEMPORARY)[1].rsplit("-", 2)
            if host == socket.gethostname() and not _alive(int(pid)):
                path.unlink(missing_ok=True)
                removed += 1
        return removed


def temporary_name(name: str) -> str:
    return f".{name}{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def canonical_json(value: Any, indent: int | None = None) -> bytes:
    """Equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fingerprint(inputs: Any) -> str:
    """16 hex digits over everything that decides a shard's bytes."""
    return sha256(canonical_json(inputs))[:16]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

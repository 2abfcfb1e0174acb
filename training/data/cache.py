"""Shards of a remote or compressed root on this machine's disk, fetched once for all processes.

A file's name holds the hash of its content, so roots, trainings and generations of a shard share a
folder without being taken for one another. Nothing else says what is there: a file that is gone,
or cut off, is fetched anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.core.store import TEMPORARY, Store
from training.config.plan import TrainingPlan

LOCKS = 64  # files that are fetched at the same time, at most
PART = ".part"  # a file that is being fetched, or the room that is kept for it
ABANDONED_S = 3600.0  # after which a part is nobody's


class Cache:
    """A folder of fetched files.

    Args:
        limit: bytes that it may hold; 0 for any number. What was opened longest ago goes first.
    """

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self.folder = folder
        self.limit = limit

    def path(self, group: str, name: str, content: str) -> Path:
        """Where a file of this content is, or will be."""
        stem, ending = os.path.splitext(name)
        return self.folder / group / f"{stem}-{content[:16]}{ending}"

    def fill(self, target: Path, size: int, fetch: Callable[[Path], None]) -> None:
        """Has `fetch` write a file of so many bytes, unless another process did by now.

        Raises:
            StorageError: the folder cannot be written.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(str(zlib.crc32(str(target).encode()) % LOCKS)):
            if target.exists():
                return
            part = target.with_name(target.name + PART)
            try:
                self._keep_room(part, size)
                fetch(part)
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)

    def used(self, path: Path) -> None:
        """Notes that a file was opened just now."""
        with contextlib.suppress(OSError):
            os.utime(path)

    def remove_leftovers(self, group: str) -> None:
        """Removes what killed processes of this host left half-written."""
        Store(self.folder).remove_leftovers(group)

    def _keep_room(self, part: Path, size: int) -> None:
        """Removes files until this one will fit, and puts a placeholder of its size there."""
        if not self.limit:
            return
        with self._lock("room"):
            files = sorted(self._files())
            total = sum(bytes for _, bytes, _ in files)
            for opened, bytes, path in files:
                if total + size <= self.limit:
                    break
                if path.name.endswith(PART) and opened > time.time() - ABANDONED_S:
                    continue
                path.unlink(missing_ok=True)
                total -= bytes
            with open(part, "wb") as file:
                file.truncate(size)  # takes no room on the disk, but counts

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(opened last, bytes, path) of all but the writer's own temporary files, for which parts
        stand."""
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder, name)
                if TEMPORARY not in name and path.parent.name != _LOCK_FOLDER:
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        yield stat.st_mtime, stat.st_size, path

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        folder = self.folder / _LOCK_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "ab") as file:
            # Where there are no locks a file may be fetched twice, and that is all.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


_LOCK_FOLDER = ".locks"


def open_cache(plan: TrainingPlan) -> Cache:
    """The cache of a run."""
    data = plan.config.data
    folder = Path(data.cache or plan.config.run_folder() / "cache").absolute()
    return Cache(folder, data.cache_bytes())

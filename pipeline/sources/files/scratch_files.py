"""Files in the scratch folder that processes of this host share: locks, room, and what is left.

A file has beside it, under its name and an ending, a record (.json), a part that is still growing
(.part) and a lock (.lock).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.core.errors import StorageError
from pipeline.core.staged_file import SCRATCH_VARIABLE
from pipeline.core.store import size as readable

RESERVE = 256 << 20  # bytes that a transfer leaves free on the disk
ABANDONED_S = 24 * 3600.0  # a file nobody has used for so long may go where space is short


def record_of(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def lock_of(target: Path) -> Path:
    return target.with_name(target.name + ".lock")


def remove(target: Path) -> None:
    for path in family(target):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[IO[str]]:
    """Holds a file's lock, which the kernel frees when its process dies."""
    path = lock_of(target)
    while True:
        lock = open(path, "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                break
        lock.close()  # its last holder has deleted it meanwhile: another process may hold a new one
    try:
        yield lock
    finally:
        if not lock.closed:
            path.unlink(missing_ok=True)
            lock.close()


def require_space(folder: Path, need: int, name: str) -> None:
    if shutil.disk_usage(folder).free < need + RESERVE:
        remove_abandoned(folder)
    free = shutil.disk_usage(folder).free
    if free < need + RESERVE:
        raise StorageError(
            f"{folder}: {readable(need)} needed for {name}, {readable(free)} free; free "
            f"some space, or set {SCRATCH_VARIABLE} to a folder on a larger disk"
        )


def remove_abandoned(folder: Path) -> None:
    """What killed runs have left, or kept for others, and nobody has used for a day."""
    targets = {path.with_suffix("") for path in folder.glob("*.json")}
    for target in targets | set(folder.glob("*.parquet")):
        used = [path.stat().st_mtime for path in family(target) if path.exists()]
        if used and time.time() - max(used) > ABANDONED_S:
            with open(lock_of(target), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                remove(target)
                lock_of(target).unlink(missing_ok=True)


def family(target: Path) -> list[Path]:
    """A file, and what lies beside it but its lock."""
    return [target, record_of(target), target.with_name(target.name + ".part")]

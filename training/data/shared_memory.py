"""Shared memory under the run's own names, and the removal of what a killed run left there.

`StreamingDataset` keeps its state in /dev/shm and two lock files in the temporary folder, under the
first number that looks free on the machine. So two starts at the same moment can take the same
number, nobody can tell whose a leftover is, and a kill leaves it for good. Here a number says which
run it belongs to, and is new at every start; the local leader of each node holds a lock beside it:

    /dev/shm/<run><start>_lock                 locked as long as the process lives
    /dev/shm/<run><start><dataset>_<name>      the library's; `locals`, `barrier`, `resume`, …
    <tmp>/<run><start><dataset>_<name>         the library's lock files

The kernel drops the lock when the process dies, however it dies, so whoever can take it may remove
what stands under it. No process is ever waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
import secrets
import tempfile
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TypeVar
from unittest import mock

from streaming.base import dataset as library
from streaming.base.constant import LOCALS
from streaming.base.shared import SharedMemory
from streaming.base.shared import prefix as names
from streaming.base.world import World

from training.randomness import keyed_seed

SHM = Path("/dev/shm")

T = TypeVar("T")


@contextlib.contextmanager
def named_after(run: Path) -> Iterator[None]:
    """Datasets made in this block put their shared memory under the run's names.

    The first of a process removes what dead processes of the same run left on this machine. Without
    /dev/shm (not Linux) the library's own names stay.

    Args:
        run: the run's folder; its path is its identity.
    """
    if not SHM.is_dir():
        yield
        return
    # The dataset's constructor has no argument for it.
    with mock.patch.object(library, "get_shm_prefix", functools.partial(_claim, run.absolute())):
        yield


def of_first_rank(value: T) -> T:
    """The first rank's value, on every rank."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def run_number(run: Path, node: int = 0) -> int:
    """Nine digits, those of this run and no other. Nodes may be containers that share /dev/shm."""
    return 100_000_000 + keyed_seed(str(run), os.getuid(), node) % 900_000_000


def remove_dead(run: int) -> None:
    """Removes what starts of this run left whose process is gone."""
    for lock in SHM.glob(f"{run}?????_lock"):
        with _taken(lock) as file:
            if file is not None:
                _remove(lock, os.pread(file, 4096, 0).decode())
    # A loader process outlives a killed trainer by seconds, in which it may lock files once more.
    for path in Path(tempfile.gettempdir()).glob(f"{run}*_filelock"):
        if not (SHM / f"{path.name[:14]}_lock").exists():
            path.unlink(missing_ok=True)


class _Start:
    """What this process holds for one run: a new number, and on local leaders its lock."""

    def __init__(self, run: int, number: int) -> None:
        self.name = f"{run}{number:05}"
        self.datasets = itertools.count()
        self.pid = os.getpid()
        self.file: int | None = None

    def hold(self) -> None:
        """Takes the lock, and gives everything back when the process ends in order."""
        lock = SHM / f"{self.name}_lock"
        self.file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        if not _is(lock, self.file):  # another start took it for a dead one's, in between
            os.close(self.file)
            self.hold()
            return
        os.write(self.file, tempfile.gettempdir().encode())
        # After the library has removed its memory and loader processes, which lock files, are gone.
        Finalize(None, self.release, exitpriority=-1)

    def release(self) -> None:
        if self.file is not None and self.pid == os.getpid():
            _remove(SHM / f"{self.name}_lock", tempfile.gettempdir())
            os.close(self.file)
            self.file = None

    def let_go(self) -> None:
        """In a forked child: a lock is held as long as any copy of its descriptor is open."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


_starts: dict[int, _Start] = {}


def _in_child() -> None:
    for start in _starts.values():
        start.let_go()
    _starts.clear()


os.register_at_fork(after_in_child=_in_child)


def _claim(
    run: Path,
    streams_local: list[str],
    streams_remote: list[str | None],
    world: World,
) -> tuple[int, SharedMemory]:
    """Takes the place of the library's get_shm_prefix: the number, and the memory that names the
    dataset's folders."""
    names._check_self(streams_local)
    own = run_number(run, world.node)
    if own not in _starts:
        _starts[own] = _Start(own, of_first_rank(secrets.randbelow(100_000)))
        if world.is_local_leader:
            remove_dead(own)
            _starts[own].hold()
    start = _starts[own]
    number = int(f"{start.name}{next(start.datasets):03}")
    name = names._get_path(number, LOCALS)
    if world.is_local_leader:
        data = names._pack_locals(streams_local, number)
        memory = SharedMemory(name, True, len(data))
        memory.buf[: len(data)] = data
    _barrier()
    if not world.is_local_leader:
        memory = SharedMemory(name, False)
    return number, memory  # pyright: ignore


@contextlib.contextmanager
def _taken(lock: Path) -> Iterator[int | None]:
    """The lock's descriptor, where its holder is dead; else None. Raises nothing."""
    try:
        file = os.open(lock, os.O_RDWR)
    except OSError:  # gone, or another user's
        yield None
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield None
    else:
        yield file
    finally:
        os.close(file)


def _remove(lock: Path, tmp: str) -> None:
    """All under a lock that is ours, the lock last."""
    start = lock.name.removesuffix("_lock")
    for path in [
        *Path(tmp or tempfile.gettempdir()).glob(f"{start}*_filelock"),
        *SHM.glob(f"{start}[0-9]*"),
        lock,
    ]:
        path.unlink(missing_ok=True)


def _is(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _barrier() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()

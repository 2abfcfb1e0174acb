"""A data file written piece by piece: its memory does not grow with it, and its name may depend on
what is in it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import process
from pipeline.core.errors import StorageError
from pipeline.core.location import located
from pipeline.core.store import TEMPORARY, Store, temporary_name
from pipeline.core.temporary import temporary_folder

SCRATCH_VARIABLE = "MICRODIT_SCRATCH"  # a folder on a large local disk; default: the system's


def scratch() -> Path:
    """The folder of this user's large temporary files, made if it is not there.

    Raises:
        StorageError: it cannot be made, or somebody else made it.
    """
    given = os.environ.get(SCRATCH_VARIABLE)
    default = Path(temporary_folder(), f"microdit-{os.getuid()}")
    folder = Path(located(given)) if given else default
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{SCRATCH_VARIABLE}={folder}: {error.strerror}") from error
    if folder == default and folder.stat().st_uid != os.getuid():
        # Anybody may make a folder of that name in /tmp, and then decide what is read.
        raise StorageError(f"{folder} is another user's; set {SCRATCH_VARIABLE} to one of yours")
    _sweep(folder)
    return folder


@functools.cache
def _sweep(folder: Path) -> None:
    """Deletes what killed processes of this host left there."""
    for path in folder.glob(f".*{TEMPORARY}*"):
        if process.is_dead(path.name.split(TEMPORARY)[1].rpartition("-")[0]):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def scratch_folder(name: str) -> tempfile.TemporaryDirectory[str]:
    """A folder of its own within the scratch folder, which goes when the block ends, or when a
    later process sees that this one was killed."""
    return tempfile.TemporaryDirectory(prefix=temporary_name(name), dir=scratch())


class StagedFile:
    """What is written so far: its size and hash, and the file that holds it."""

    def __init__(self, store: Store, folder: str, path: Path) -> None:
        self._store, self._folder = store, folder
        self._hash = hashlib.sha256()
        self.path = path
        self.bytes = 0
        self._file = open(path, "wb")  # noqa: SIM115 (staged_file() closes it)

    def write(self, data: bytes) -> int:
        with self._store.explained(self._folder, "write", len(data)):
            self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.bytes

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        with self._store.explained(self._folder, "write"):
            self._file.close()


@contextlib.contextmanager
def staged_file(store: Store, folder: str) -> Iterator[StagedFile]:
    """A file in the making; `store.place` gives it its name, or it is gone when the block ends.

    On a local root it lies where it will stay, so that naming it costs nothing.
    """
    if store.local:
        home = Path(store.url(folder))
        with store.explained(folder, "write"):
            home.mkdir(parents=True, exist_ok=True)
    else:
        home = scratch()
    path = home / temporary_name("spool")
    with store.explained(folder, "write"):
        made = StagedFile(store, folder, path)
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            made._file.close()
        path.unlink(missing_ok=True)

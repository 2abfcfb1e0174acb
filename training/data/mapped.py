"""Files in memory without an open descriptor each: a training looks into thousands at once."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections import OrderedDict

import numpy as np

MAPS = 4096  # of a process; the kernel allows 65,530 (vm.max_map_count), views of batches included


class Maps:
    """The files that this process has mapped last; the others are unmapped when no view of them is
    left."""

    def __init__(self, limit: int = MAPS) -> None:
        self._limit = limit
        self._maps: OrderedDict[str, memoryview] = OrderedDict()

    def get(self, path: str) -> memoryview | None:
        found = self._maps.get(path)
        if found is not None:
            self._maps.move_to_end(path)
        return found

    def add(self, path: str, data: memoryview) -> None:
        self._maps[path] = data
        while len(self._maps) > self._limit:
            self._maps.popitem(last=False)

    def forget_deleted(self) -> None:
        """Lets go of files that are gone by now: until then the disk has no room of them."""
        for path in [path for path in self._maps if not os.path.exists(path)]:
            del self._maps[path]

    def __len__(self) -> int:
        return len(self._maps)

    def __reduce__(self):  # for loader processes that are spawned: maps stay behind
        return Maps, (self._limit,)


def map_file(path: str, size: int) -> memoryview:
    """A file's bytes, read when they are looked at.

    Args:
        size: that the file is known to have: bytes that are not there would kill the process
            (SIGBUS) when they are looked at.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    # As mmap.mmap, which keeps a descriptor open (trackfd=False is Python 3.13's).
    with open(path, "rb") as file:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)} (mapping {size} bytes)", path)
    array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    array.flags.writeable = False
    weakref.finalize(array, _libc.munmap, address, size).atexit = False  # all views keep the array
    return memoryview(array)  # pyright: ignore


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value

"""Memory that loader processes fill and the trainer reads, over and over again.

A batch that a loader process makes travels in shared memory. New pages of that cost ten times what
it takes to copy a caption's vectors into them (4 against 0.3 µs a page, measured), so they are
allocated once and lent: a process fills a free buffer, the trainer gets a tensor over it, and when
that tensor is gone the buffer is free again.
"""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any

import torch
from torch.utils.data import get_worker_info


class Pool:
    """Buffers of one size for each loader process.

    Args:
        workers: loader processes.
        each: buffers that each of them has; where all are lent, it allocates a new one.
        size: bytes of a buffer.
    """

    def __init__(self, workers: int, each: int, size: int) -> None:
        self._each, self._size = each, size
        count = workers * each
        self._memory = torch.empty(0, dtype=torch.uint8)
        if count:
            storage = torch.UntypedStorage._new_shared(count * size)
            self._memory.set_(storage, 0, (count, size))  # pyright: ignore
        self._lent = torch.zeros(count, dtype=torch.uint8).share_memory_()
        self._number = next(_numbers)
        _pools[self._number] = self

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
        """A tensor to be filled, of any content, and what to put in its place into a batch."""
        worker = get_worker_info()
        if worker is None:
            tensor = torch.empty(shape, dtype=dtype)
            return tensor, tensor
        size = math.prod(shape) * dtype.itemsize
        own = range(worker.id * self._each, (worker.id + 1) * self._each)
        lent = self._lent.numpy()
        slot = next((slot for slot in own if not lent[slot]), None)
        if slot is None or size > self._size:
            storage = torch.UntypedStorage._new_shared(size)
            tensor = torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # pyright: ignore
            return tensor, tensor
        lent[slot] = 1
        tensor = self._memory[slot, :size].view(dtype).view(shape)
        return tensor, _Lent(self._number, slot, shape, dtype)

    def _borrow(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """In the trainer: the tensor that a loader process filled."""
        array = self._memory.numpy()[slot, : math.prod(shape) * dtype.itemsize]
        tensor = torch.from_numpy(array)  # its storage keeps the array, under all its views
        weakref.finalize(array, self._give_back, slot).atexit = False
        return tensor.view(dtype).view(shape)

    def _give_back(self, slot: int) -> None:
        self._lent.numpy()[slot] = 0


class _Lent:
    """Stands for a tensor in a batch on its way to the trainer, where it arrives as one."""

    def __init__(self, pool: int, *place: Any) -> None:
        self._place = (pool, *place)

    def __reduce__(self):
        return _arrived, self._place


def _arrived(pool: int, *place: Any) -> torch.Tensor:
    return _pools[pool]._borrow(*place)


_numbers = itertools.count()
_pools: weakref.WeakValueDictionary[int, Pool] = weakref.WeakValueDictionary()  # the trainer's own

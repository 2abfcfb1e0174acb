"""Bounded room for many downloads at once, whose results are wanted in order.

Connections, connections to one host and bytes in memory are all bounded, and results are handed
over in the order of the list. Taken together that can lock: everything is held by later samples,
which wait for the one that is wanted next to be handed over, while that one waits for room. So the
one that is wanted next always gets in.
"""

from __future__ import annotations

import asyncio


class Order:
    """Which index is wanted next, and who waits for room; of one event loop."""

    def __init__(self) -> None:
        self.wanted = 0
        self._waiting: dict[int, tuple[Limiter, int, asyncio.Future[None]]] = {}

    def advance(self, index: int) -> None:
        """The consumer waits for `index` now."""
        self.wanted = index
        if index in self._waiting:
            room, amount, future = self._waiting[index]
            room.let_in(index, amount, future)


class Limiter:
    """So much at once, first come first served; what is wanted next may exceed it."""

    def __init__(self, size: int, order: Order) -> None:
        self._free = size
        self._order = order
        self._queue: dict[int, tuple[int, asyncio.Future[None]]] = {}  # in order of arrival

    async def take(self, index: int, amount: int = 1) -> None:
        if index == self._order.wanted or (not self._queue and self._free >= amount):
            self._free -= amount
            return
        future = asyncio.get_running_loop().create_future()
        self._queue[index] = (amount, future)
        self._order._waiting[index] = (self, amount, future)
        try:
            await future
        except asyncio.CancelledError:
            let_in = future.done() and not future.cancelled()
            self._forget(index)
            self.give(amount if let_in else 0)  # the next one may fit where this one did not
            raise

    def give(self, amount: int = 1) -> None:
        self._free += amount
        while self._queue:
            index, (wanted, future) = next(iter(self._queue.items()))
            if self._free < wanted:
                return
            self.let_in(index, wanted, future)

    def let_in(self, index: int, amount: int, future: asyncio.Future[None]) -> None:
        self._forget(index)
        if not future.done():
            self._free -= amount
            future.set_result(None)

    def _forget(self, index: int) -> None:
        self._queue.pop(index, None)
        self._order._waiting.pop(index, None)

"""Work spread over processes of this machine, for commands that need no cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pipeline.core.errors import SettingError

T = TypeVar("T")
R = TypeVar("R")


class Processes:
    """Runs a function over items in processes of this machine; a context manager."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), _begin, (os.getpid(),)
            )

    def __enter__(self) -> Callable[[Callable[[T], R], Iterable[T]], Iterator[R]]:
        return self._map

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results as they come; two items a worker are under way, so memory is bounded."""
        if self._pool is None:
            yield from map(function, items)
            return
        pending: set[Future[R]] = set()
        waiting = iter(items)
        try:
            while True:
                while len(pending) < 2 * self.workers:
                    try:
                        pending.add(self._pool.submit(function, next(waiting)))
                    except StopIteration:
                        break
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise SettingError(
                f"--workers {self.workers}: a process that verified shards was killed (out of "
                "memory?); give fewer"
            ) from error


def _begin(parent: int) -> None:
    """In a new process: leaves Ctrl-C to its parent, and ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

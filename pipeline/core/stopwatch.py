"""Where a worker's time goes, over all its threads."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator

PREFIX = "ms "  # of the names under which a worker's counters hold milliseconds


class Stopwatch:
    """`with watch("decode"): ...` adds up; threads may use it side by side."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            with self._lock:
                self._seconds[what] = self._seconds.get(what, 0.0) + spent

    def take(self) -> Counter[str]:
        """Milliseconds since it was last asked, under names that begin with PREFIX."""
        with self._lock:
            taken, self._seconds = self._seconds, {}
        return Counter({PREFIX + name: math.ceil(1000 * spent) for name, spent in taken.items()})

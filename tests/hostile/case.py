"""One hostile input and what has to become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SAMPLE = "sample"
ERROR = "error"  # of an archive that cannot be had whole: its shard fails, and is tried again


@dataclass(frozen=True)
class Case:
    """An input, by a function that makes it: nothing of it is stored in the repository."""

    name: str  # of the file that tests.hostile.make writes
    verdict: str  # SAMPLE, ERROR, or the reason of a reject
    why: str  # one line
    make: Callable[[], bytes]

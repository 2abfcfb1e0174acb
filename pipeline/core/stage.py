"""What a stage is, for whoever runs it.

A stage is a pure function of (input shard, stage config, weights) and does not know who runs it:
`plan` says which shards there are and what decides their bytes, `open` returns the worker that
makes one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from pipeline.core.catalog import Catalog
from pipeline.core.commits import Commit
from pipeline.core.samples import InputShard
from pipeline.core.store import Store


@dataclass(frozen=True)
class Job:
    """One input shard and the output groups that are wanted of it."""

    shard: InputShard
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)  # group -> fingerprint inputs
    dropped: frozenset[str] = frozenset()  # keys to leave out
    samples: int = 0  # how many there are to be, where that is known


@dataclass(frozen=True)
class Needs:
    """What each worker of a stage holds."""

    cpus: float = 1.0
    gpus: float = 0.0
    in_hand: int = 1  # shards at once: one is encoded while another is read or written
    workers: int | None = None  # where nobody says how many; None: as many as there is room for


class Worker(Protocol):
    """Makes shards, in as many threads as the stage needs; loads weights on first use."""

    def __call__(self, job: Job) -> dict[str, Commit]:
        """Makes and commits every group of the job."""
        ...

    def take_counters(self) -> Counter[str]:
        """What happened since it was last asked, for the run report: e.g. which weights were
        loaded how often. Names that begin with stopwatch.PREFIX say where the time went."""
        ...


class Stage(Protocol):
    name: str
    source: str
    needs: Needs

    def groups(self) -> list[str]:
        """Every group that the stage writes."""
        ...

    def plan(self, catalog: Catalog) -> Iterable[Job]:
        """Every input shard with every group the stage makes of it, done or not."""
        ...

    def estimate(self, job: Job, group: str) -> int:
        """Bytes that the job will write into the group, at most; before any shard of it exists."""
        ...

    def open(self, store: Store) -> Worker:
        """The worker: called once a process."""
        ...


@runtime_checkable
class Shows(Protocol):
    """A stage that can show what it has made."""

    def page(self, store: Store, counters: Counter[str], seconds: float) -> str:
        """HTML that needs no other file, kept beside the run's report.

        Args:
            counters: what the run's workers counted.
            seconds: the run took.
        """
        ...

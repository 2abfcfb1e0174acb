"""What a run did: kept while it goes on, written to <source>/runs/ when it ends."""

from __future__ import annotations

import platform
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version

from pipeline.core import process
from pipeline.core.commits import Commit
from pipeline.core.stopwatch import PREFIX
from pipeline.core.store import Store

RATES = ("captions", "tokens")  # counters of which a report says how many a second
KEPT_FAILURES = 1000  # in memory and in the report; all of them are in the groups' failures/


@dataclass
class Report:
    """Counts of one run of one stage; its memory does not grow with the shards."""

    stage: str
    source: str
    total: int = 0  # shards the run was to make
    shards: int = 0  # made
    skipped: int = 0  # already done
    outdated: int = 0  # made from other inputs, and left as they are
    elsewhere: int = 0  # made meanwhile by another run
    samples: int = 0
    bytes: int = 0
    groups: dict[str, dict[str, int]] = field(default_factory=dict)  # -> samples, bytes
    rejects: Counter[str] = field(default_factory=Counter)
    stale: Counter[str] = field(default_factory=Counter)  # why -> shards left as they are
    failed: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # shard -> why; the first of them
    retries: int = 0  # attempts that were made again: workers lost, errors that went away
    counters: Counter[str] = field(default_factory=Counter)  # what the stage itself counted
    #: Shard that a worker is at -> samples dealt with, and how many it has (0: unknown).
    in_hand: dict[str, tuple[int, int]] = field(default_factory=dict)
    workers: int = 0
    seconds: float = 0.0
    page: str = ""  # path of a page that shows what was made, or ""
    stopped: str = ""  # the signal that ended it, or ""
    started_at: float = field(default_factory=time.time)

    def add(self, commits: dict[str, Commit]) -> None:
        """One shard was made: its commit in each group."""
        self.shards += 1
        for name, commit in commits.items():
            group = self.groups.setdefault(name, {"samples": 0, "bytes": 0})
            group["samples"] += commit.samples
            group["bytes"] += commit.bytes()
            self.rejects.update(commit.rejects)
            self.bytes += commit.bytes()
        # A picture with a caption but no latent, say, is of no use to anyone.
        self.samples += min(commit.samples for commit in commits.values())

    def fail(self, shard: str, error: str) -> None:
        self.failed += 1
        if len(self.failures) < KEPT_FAILURES:
            self.failures[shard] = error

    def spent(self) -> dict[str, int]:
        """Milliseconds of the workers by what they did, where the stage tells, longest first."""
        spent = {
            name.removeprefix(PREFIX): count
            for name, count in self.counters.items()
            if name.startswith(PREFIX)
        }
        return dict(sorted(spent.items(), key=lambda item: -item[1]))

    @property
    def finished(self) -> int:
        return self.shards + self.elsewhere + self.failed

    @property
    def samples_in_hand(self) -> int:
        return sum(done for done, _ in self.in_hand.values())

    @property
    def advanced(self) -> float:
        """Shards that are finished, with what is done of those in hand."""
        parts = (min(done / total, 1) for done, total in self.in_hand.values() if total)
        return min(self.finished + sum(parts), self.total)

    def path(self) -> str:
        """Under <source>/runs/<stage>/, named by time: the one place where times are."""
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.started_at))
        name = f"{moment}-{process.identity().split('-')[1]}.json"
        return f"{self.source}/runs/{self.stage}/{name}"

    def write(self, store: Store) -> str:
        """Its path."""
        record = vars(self) | {
            "host": platform.node(),
            "version": version("microdit"),
            "samples_per_s": self._rate(self.samples),
        }
        for name in RATES:
            if self.counters[name]:
                record[f"{name}_per_s"] = self._rate(self.counters[name])
        del record["in_hand"]
        if not self.page:
            del record["page"]  # its stage shows nothing
        store.write_json(self.path(), record)
        return self.path()

    def _rate(self, count: int) -> float | None:
        return round(count / self.seconds, 3) if self.seconds else None


def last_rates(store: Store, source: str, stage: str) -> dict[str, float]:
    """Group -> samples a second of the newest run that made some of it, of the last ten runs."""
    folder = f"{source}/runs/{stage}"
    reports = [name for name in store.names(folder) if name.endswith(".json")]
    rates: dict[str, float] = {}
    for name in reports[-10:]:
        record = store.read_json(f"{folder}/{name}")
        for group, made in record["groups"].items():
            if record["seconds"]:
                rates[group] = made["samples"] / record["seconds"]
    return rates

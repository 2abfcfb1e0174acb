"""The commits of a root as they were when first asked for: one consistent view for one plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.core import drops, facts
from pipeline.core.commits import Commit, scan
from pipeline.core.store import Store


class Head(NamedTuple):
    """What planning needs of a commit; ten thousand of them fit into a few megabytes."""

    fingerprint: str
    content: str
    split: str
    samples: int
    bytes: int
    rejects: tuple[tuple[str, int], ...]  # (reason, count)
    facts: str  # of pipeline.core.facts: what its group's shards have in common


class Catalog:
    """Reads each group's records once, however many stages ask."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._heads: dict[str, dict[str, Head]] = {}
        self._dropped: dict[str, dict[str, frozenset[str]]] = {}

    def heads(self, group: str) -> dict[str, Head]:
        """Shard id -> head, in order of id."""
        if group not in self._heads:
            self._heads[group] = dict(_head(group, c) for c in scan(self.store, group))
        return self._heads[group]

    def dropped(self, source: str) -> dict[str, frozenset[str]]:
        """Shard id -> keys that were taken out."""
        if source not in self._dropped:
            self._dropped[source] = drops.read(self.store, source)
        return self._dropped[source]

    def scan(self, group: str) -> Iterator[Commit]:
        """The whole records, read anew."""
        return scan(self.store, group)


_rejects: dict[tuple, tuple] = {}  # equal ones are shared: most shards have none


def _head(group: str, commit: Commit) -> tuple[str, Head]:
    rejects = tuple(commit.rejects.items())
    return commit.shard, Head(
        commit.fingerprint,
        commit.content(),
        commit.split,
        commit.samples,
        commit.bytes(),
        _rejects.setdefault(rejects, rejects) if len(_rejects) < 1000 else rejects,
        facts.of(group, commit.inputs),
    )

"""The commits of a root as they were when first asked for: one consistent view for one plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pipeline.core import drops, facts, mends
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
    mends: int = mends.MENDS  # that the version knew which made it
    mended: tuple[str, ...] = ()  # kinds of mends that it was redone for


class Catalog:
    """Reads each group's records once, however many stages ask.

    Args:
        announce: called with a line when shards of an earlier version are looked through.
    """

    def __init__(self, store: Store, announce: Callable[[str], None] = lambda line: None) -> None:
        self.store = store
        self.announce = announce
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

    def looked(self, group: str, shards: Iterable[str], look: mends.Look) -> dict[str, set[str]]:
        """Shard -> kinds of what its files hold that this version makes otherwise."""
        wanted = set(shards) & self.heads(group).keys()
        commits = (commit for commit in self.scan(group) if commit.shard in wanted)
        if not wanted:
            return {}
        return mends.look(self.store, group, commits, len(wanted), look, self.announce)

    def mended(
        self, group: str, findings: Callable[[list[str]], dict[str, set[str]]]
    ) -> dict[str, list[str]]:
        """Shard -> kinds of mends that concern it, for its inputs; no others are named.

        Args:
            findings: of shards that an earlier version made, shard -> kinds.
        """
        heads = self.heads(group)
        found = (
            findings(old) if (old := [s for s, h in heads.items() if h.mends < mends.MENDS]) else {}
        )
        every = {s: sorted({*head.mended, *found.get(s, ())}) for s, head in heads.items()}
        return {shard: kinds for shard, kinds in every.items() if kinds}

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
        commit.counters.get(mends.COUNTER, 0),
        tuple(commit.inputs.get("mended", ())),
    )

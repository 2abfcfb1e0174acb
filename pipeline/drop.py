"""`pipeline drop`: samples taken out by key or URL, wherever their shards are.

Readers leave them out at once; their bytes go when the stages redo the shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import drops, layout
from pipeline.core.commits import Commit, read_commit, read_file
from pipeline.core.errors import BrokenShard
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.status import groups_of

PREFIX = 5  # digits of a key that name its shard, in img2dataset's convention


@dataclass
class Found:
    """What the entries of a list are, in one source."""

    new: dict[str, set[str]] = field(default_factory=dict)  # shard -> keys that are out now
    before: dict[str, set[str]] = field(default_factory=dict)  # and those that were out already
    matched: set[str] = field(default_factory=set)  # entries

    def count(self, keys: dict[str, set[str]]) -> int:
        return sum(map(len, keys.values()))


def read_list(lines: Iterable[str]) -> list[str]:
    """One entry a line, each once; "#" begins a comment, blank lines do not count.

    A "#" within a URL is part of it: a comment has the line to itself or a space before it.
    """
    entries = (line.split(" #")[0].strip() for line in lines if not line.lstrip().startswith("#"))
    return list(dict.fromkeys(entry for entry in entries if entry))


def drop(
    store: Store,
    source: str,
    entries: list[str],
    column: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Takes samples of a source out.

    Args:
        entries: keys or URLs.
        column: "key" or "url": what the entries are.
        progress: called with (shards searched, of how many).

    Returns:
        What was found; entries that are not in `matched` are in no shard.
    """
    search = _Search(store, source, column, entries)
    if column == "key":
        search.dropped()
        search.by_prefix()
    search.everywhere(progress)
    found = search.found
    if found.new:
        drops.add(store, source, {shard: sorted(keys) for shard, keys in found.new.items()})
    return found


class _Search:
    def __init__(self, store: Store, source: str, column: str, entries: list[str]) -> None:
        self.store, self.source, self.column = store, source, column
        self.left = set(entries)  # a key is in one shard; a URL may be in several
        self.out = drops.read(store, source)
        self.found = Found()
        images = layout.images_group(source)
        made = (f"{source}/{g}" for g in groups_of(store, source))
        # Pictures first: their parquets have every key, and they alone have URLs.
        self.groups = [images] + [g for g in made if g != images and column == "key"]
        self.shards = sorted(
            {n.removesuffix(".json") for g in self.groups for n in store.names(f"{g}/commits")}
        )

    def dropped(self) -> None:
        """Keys that a list names already: their shards may have been made anew without them."""
        for shard, keys in self.out.items():
            for key in self.left & keys:
                self._match(shard, key, key)

    def by_prefix(self) -> None:
        """Keys that begin with the name of their shard."""
        by_shard: dict[str, list[str]] = {}
        for key in sorted(self.left):
            by_shard.setdefault(key[:PREFIX], []).append(key)
        for shard in sorted(by_shard.keys() & set(self.shards)):
            self._look(shard, pa.array(by_shard[shard], pa.string()))

    def everywhere(self, progress: Callable[[int, int], None]) -> None:
        """Every shard: first its pictures, then what was made of them."""
        wanted = pa.array(sorted(self.left), pa.string())
        for number, shard in enumerate(self.shards, 1):
            if not self.left:
                return
            self._look(shard, wanted)
            progress(number, len(self.shards))

    def _look(self, shard: str, wanted: pa.Array) -> None:
        for table in self._tables(shard):
            hits = table.filter(pc.is_in(table[self.column], value_set=wanted))  # pyright: ignore
            for row in hits.select(list({"key", self.column})).to_pylist():
                self._match(shard, row["key"], row[self.column])

    def _tables(self, shard: str) -> Iterator[pa.Table]:
        """The parquets with a shard's keys: of its pictures, and of the groups made of them.

        Where a picture is gone or was made anew, a latent of it may still be there.
        """
        for group in self.groups:
            commit = read_commit(self.store, group, shard)
            table = None if commit is None else self._table(group, commit)
            if table is not None:
                yield table
            if not self.left:
                return

    def _table(self, group: str, commit: Commit) -> pa.Table | None:
        try:
            return from_parquet(read_file(self.store, group, commit, ".parquet"))
        except (BrokenShard, KeyError):
            return None  # `pipeline verify` says so; the other groups have the keys as well

    def _match(self, shard: str, key: str, entry: str) -> None:
        before = key in self.out.get(shard, frozenset())
        found = self.found.before if before else self.found.new
        found.setdefault(shard, set()).add(key)
        self.found.matched.add(entry)
        if self.column == "key":
            self.left.discard(entry)


def describe(source: str, found: Found) -> list[str]:
    """Lines for the user: what is out, and what is left to do for the bytes to go."""
    new, before = found.count(found.new), found.count(found.before)
    shards = Counter({shard: len(keys) for shard, keys in found.new.items()})
    some = ", ".join(f"{shard}: {count}" for shard, count in sorted(shards.items())[:10])
    more = ", …" if len(shards) > 10 else ""
    detail = f" ({some}{more})" if new else ""
    lines = [
        f"{source}: {new} samples of {len(shards)} shards are out now{detail}, "
        f"{before} were out already"
    ]
    if new or before:
        lines.append(
            "  training leaves them out from its next start; their bytes go with "
            f"`pipeline run all --source {source} --stale`, then `pipeline prune --source "
            f"{source}` (`pipeline status` shows groups that are still stale)"
        )
    return lines

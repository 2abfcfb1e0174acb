"""`pipeline dedup`: pictures that several shards hold, by the hashes their parquets have.

A stage sees one shard, so it drops duplicates within it. What lies in several is found here, and
goes to the drop lists that every reader honours: of equal pictures the first stays, in the order of
source, shard and key. Pictures that training does not stream (held out, evaluation) come before all
others and always stay: what training has in common with them goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import drops, layout
from pipeline.core.commits import Commit, read_file, scan
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet

TRAIN = "train"  # the split that training streams
HASH = np.dtype([("high", "<u8"), ("low", "<u8")])  # 128 of SHA-256's 256 bits: 16 bytes a picture


@dataclass
class Duplicates:
    """What there is under a root."""

    pictures: int = 0
    new: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # source -> shard -> keys
    before: int = 0  # duplicates that were out already

    def count(self, source: str) -> int:
        return sum(map(len, self.new.get(source, {}).values()))


def find(
    store: Store,
    sources: list[str],
    progress: Callable[[int, int, str], None] = lambda done, total, source: None,
) -> Duplicates:
    """Every picture of training that equals an earlier one, byte for byte as it is stored.

    Memory: 24 bytes a picture, and as much again while they are compared. A picture that was
    dropped already still counts as the first of its kind: a takedown takes its copies along.

    Args:
        progress: called with (shards read, of how many, source) in each source.

    Raises:
        BrokenShard: a parquet is gone or differs from its commit.
    """
    hashes: list[np.ndarray] = []
    shards: list[tuple[str, Commit, int]] = []  # source, commit, where its pictures begin
    begin = 0
    commits = {source: [*scan(store, layout.images_group(source))] for source in sources}
    for held_out in (True, False):
        for source, all_of_it in commits.items():
            chosen = [commit for commit in all_of_it if (commit.split != TRAIN) == held_out]
            for number, commit in enumerate(chosen, 1):
                table = _successes(store, layout.images_group(source), commit, "sha256")
                hashes.append(_parsed(table["sha256"]))
                shards.append((source, commit, begin))
                begin += table.num_rows
                progress(number, len(chosen), source)
    found = Duplicates(pictures=begin)
    if not begin:
        return found
    later = _later(np.concatenate(hashes))
    out = {source: drops.read(store, source) for source in sources}
    for source, commit, rows in _by_shard(shards, later):
        if commit.split != TRAIN:
            continue
        table = _successes(store, layout.images_group(source), commit, "key")
        keys = table["key"].take(pa.array(rows)).to_pylist()
        known = out[source].get(commit.shard, frozenset())
        new = [key for key in keys if key not in known]
        found.before += len(keys) - len(new)
        if new:
            found.new.setdefault(source, {})[commit.shard] = new
    return found


def take_out(store: Store, found: Duplicates) -> None:
    """Adds a drop list to each source that has some."""
    for source, shards in found.new.items():
        drops.add(store, source, shards)


def _successes(store: Store, group: str, commit: Commit, column: str) -> pa.Table:
    """A column of the pictures that are there, in order of key."""
    table = from_parquet(read_file(store, group, commit, ".parquet"))
    return table.filter(pc.equal(table["status"], "success")).select([column])  # pyright: ignore


def _parsed(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) HASH of hexadecimal SHA-256 strings."""
    digests = (bytes.fromhex(text[:32]) for text in column.to_pylist())
    return np.frombuffer(b"".join(digests), HASH)


def _later(hashes: np.ndarray) -> np.ndarray:
    """Positions, in order, of what equals something before it."""
    order = np.lexsort((hashes["low"], hashes["high"]))  # stable: equal ones stay in order
    ranked = hashes[order]
    return np.sort(order[1:][ranked[1:] == ranked[:-1]])


def _by_shard(
    shards: list[tuple[str, Commit, int]], later: np.ndarray
) -> Iterator[tuple[str, Commit, np.ndarray]]:
    """(source, commit, rows) of the shards that hold some of these positions."""
    starts = np.array([begin for *_, begin in shards])
    which = np.searchsorted(starts, later, side="right") - 1
    for number in np.unique(which):
        source, commit, begin = shards[number]
        yield source, commit, later[which == number] - begin


def describe(found: Duplicates, sources: list[str], taken: bool) -> list[str]:
    """Lines for the user."""
    lines = [
        f"{source}: {found.count(source)} duplicates in {len(found.new.get(source, {}))} shards "
        + ("are out now" if taken else "would be out")
        for source in sources
    ]
    total = sum(found.count(source) for source in sources)
    lines.append(
        f"dedup: {found.pictures} pictures, {total} equal to an earlier one, {found.before} more "
        "that were out already"
    )
    if taken and total:
        lines.append(
            "  training leaves them out from its next start; their bytes go with `pipeline run all "
            "--source SOURCE --stale`, then `pipeline prune`"
        )
    return lines

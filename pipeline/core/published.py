"""A column group as its readers see it: its index, and data files that are what was committed.

Whoever reads published MDS groups reads them here: the trainer, held-out pictures, scores. A file
is checked against its shard's commit record, and the shard against what the index says of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.core.commits import Commit, broken, read_commit, reason, remedy, scan
from pipeline.core.errors import SettingError
from pipeline.core.mds import decode_shard, parse_index, require_header, stored, unpack
from pipeline.core.store import Store, sha256

Row = tuple[dict[str, Any], dict[str, str]]  # a shard's entry in the index, and ours beside it


def read_index(store: Store, group: str) -> list[Row]:
    """Every shard of a group, in order.

    Raises:
        FileNotFoundError: the group has no index.
        SettingError: it is damaged, or not one of ours.
    """
    path = f"{group}/index.json"
    data = store.read(path)
    try:
        entries, inputs = parse_index(data)
        names = [stored(entry)["basename"] for entry in entries]
        names += [record["keys"] for record in inputs if "keys" in record]
        if any("/" in name for name in names):
            raise ValueError("names of files with a slash")
    except ValueError as error:
        what = f"is no index of MDS shards ({reason(error)})"
        raise SettingError(f"{store.url(path)} {what}; {remedy(store, path)}") from error
    if len(entries) != len(inputs):
        raise SettingError(
            f'{store.url(path)}: has no "inputs" beside its shards, so splits and captions cannot '
            f"be told; it was not written by `pipeline run`"
        )
    return list(zip(entries, inputs, strict=True))


class Commits:
    """What the commits of a group say of its files, each read when it is first asked for.

    A copy of a group without its commits can be read; then sizes alone are known, from the index.
    """

    def __init__(self, store: Store, group: str) -> None:
        self._store, self._group = store, group
        self._known: dict[str, Commit | None] = {}
        self._complete = False

    def read_all(self) -> None:
        """All at once: on an object store thousands of small requests are saved."""
        self._known = {commit.shard: commit for commit in scan(self._store, self._group)}
        self._complete = True

    def facts(self, shard: str, name: str) -> dict[str, Any] | None:
        """{"bytes", "sha256"} of a file; None where its shard has no commit, or one that names
        another generation: the index that the caller reads is older.

        Raises:
            BrokenShard: the record is damaged.
        """
        if shard not in self._known and not self._complete:
            self._known[shard] = read_commit(self._store, self._group, shard)
        commit = self._known.get(shard)
        return None if commit is None else commit.files.get(name)


def read_whole(store: Store, group: str, commits: Commits, shard: str, name: str) -> bytes:
    """A data file of a group.

    Raises:
        BrokenShard: it is gone, or not what was committed.
    """
    path = f"{group}/{name}"
    try:
        data = store.read(path)
    except FileNotFoundError:
        raise broken(store, path, "is missing") from None
    facts = commits.facts(shard, name)
    if facts is not None:
        require_bytes(store, path, len(data), facts["bytes"], "its commit record")
        if sha256(data) != facts["sha256"]:
            raise broken(store, path, "differs from its commit record (sha256)")
    return data


def read_samples(store: Store, group: str, commits: Commits, row: Row) -> Iterator[dict[str, Any]]:
    """The samples of a shard, which is read whole; arrays are views of its bytes.

    Raises:
        BrokenShard: it is gone, or not what was committed, or no MDS shard.
    """
    entry, record = row
    name = stored(entry)["basename"]
    data = read_whole(store, group, commits, record["shard"], name)
    path = f"{group}/{name}"
    require_bytes(store, path, len(data), stored(entry)["bytes"], "the index")
    try:
        shard = unpacked(store, path, data, entry)
        require_header(shard, entry)
        yield from decode_shard(shard)[1]
    except ValueError as error:
        raise broken(store, path, f"is damaged: {reason(error)}") from error


def unpacked(store: Store, path: str, data: bytes, entry: dict[str, Any]) -> bytes:
    """The shard in a stored file. Raises BrokenShard where it is none."""
    try:
        shard = unpack(data, entry)
    except Exception as error:  # what zstd, brotli, snappy and bz2 raise has no common base
        raise broken(store, path, f"cannot be unpacked: {reason(error)}") from error
    require_bytes(store, path, len(shard), entry["raw_data"]["bytes"], "the index", "unpacked ")
    return shard


def require_bytes(
    store: Store, path: str, found: int, expected: int, by: str, what: str = ""
) -> None:
    """Raises BrokenShard where a file has another size."""
    if found != expected:
        raise broken(store, path, f"has {found} {what}bytes, {by} says {expected}")

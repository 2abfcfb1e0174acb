"""Samples taken out (takedown): lists beside the groups that every reader honours.

Each `pipeline drop` adds one file, named by its content, under <source>/drops/; nothing is ever
changed in place, so two drops at once lose nothing. Bytes go when the stages redo the shards
(`--stale`) and `pipeline prune` frees what they replaced.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.core.errors import SettingError
from pipeline.core.store import Store, fingerprint

SCHEMA = 1


def add(store: Store, source: str, keys: dict[str, list[str]]) -> None:
    """Adds a list: shard id -> keys to drop."""
    record = {
        "schema": SCHEMA,
        "shards": {shard: sorted(set(found)) for shard, found in sorted(keys.items())},
    }
    store.write_json(f"{source}/drops/{fingerprint(record)}.json", record)


def read(store: Store, source: str) -> dict[str, frozenset[str]]:
    """Shard id -> dropped keys, over every list of a source.

    Raises:
        SettingError: a list is damaged, or was written by a newer version of this package.
    """
    dropped: dict[str, set[str]] = {}
    for name in store.names(f"{source}/drops"):
        for shard, keys in _shards(store, f"{source}/drops/{name}").items():
            dropped.setdefault(shard, set()).update(keys)
    return {shard: frozenset(keys) for shard, keys in dropped.items()}


def _shards(store: Store, path: str) -> dict[str, list[str]]:
    try:
        record = store.read_json(path)
    except ValueError:
        record = None
    schema = record.get("schema") if isinstance(record, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise SettingError(
            f"{store.url(path)}: schema {schema}, this version reads up to {SCHEMA}; upgrade the "
            "package"
        )
    shards = record.get("shards") if isinstance(record, dict) and schema else None
    if not isinstance(shards, dict) or not all(isinstance(keys, list) for keys in shards.values()):
        raise SettingError(
            f"{store.url(path)}: damaged, so nobody can tell what it took out; put it back, or "
            "remove it and run the `pipeline drop` that wrote it once more"
        )
    return shards


def inputs(dropped: Iterable[str]) -> dict[str, str]:
    """What a shard's fingerprint says of its dropped keys: nothing where there are none."""
    keys = sorted(dropped)
    return {"dropped": fingerprint(keys)} if keys else {}

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
        SettingError: a list was written by a newer version of this package.
    """
    dropped: dict[str, set[str]] = {}
    for name in store.names(f"{source}/drops"):
        record = store.read_json(f"{source}/drops/{name}")
        if record["schema"] > SCHEMA:
            raise SettingError(
                f"{store.url(f'{source}/drops/{name}')}: schema {record['schema']}, this version "
                f"reads up to {SCHEMA}; upgrade the package"
            )
        for shard, keys in record["shards"].items():
            dropped.setdefault(shard, set()).update(keys)
    return {shard: frozenset(keys) for shard, keys in dropped.items()}


def inputs(dropped: Iterable[str]) -> dict[str, str]:
    """What a shard's fingerprint says of its dropped keys: nothing where there are none."""
    keys = sorted(dropped)
    return {"dropped": fingerprint(keys)} if keys else {}

"""Samples taken out (takedown): lists beside the groups that every reader honours.

Each `pipeline drop` adds one file, named by its content, under <source>/drops/; nothing is ever
changed in place, so two drops at once lose nothing. Bytes go when the stages redo the shards
(`--stale`) and `pipeline prune` frees what they replaced, or with `pipeline drop --purge`.

A list may also name links, by hash: a takedown holds after the last row that spelt one is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.core.errors import SettingError
from pipeline.core.store import Store, fingerprint, sha256
from pipeline.core.urls import canonical

SCHEMA = 1


def add(store: Store, source: str, keys: dict[str, list[str]], links: Iterable[str] = ()) -> None:
    """Adds a list.

    Args:
        keys: shard id -> keys to drop.
        links: hashes of links (`link_hash`) that are not to be had any more.
    """
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "shards": {shard: sorted(set(found)) for shard, found in sorted(keys.items())},
    }
    if hashes := sorted(set(links)):
        record["links"] = hashes
    store.write_json(f"{source}/drops/{fingerprint(record)}.json", record)


def read(store: Store, source: str) -> dict[str, frozenset[str]]:
    """Shard id -> dropped keys, over every list of a source.

    Raises:
        SettingError: a list is damaged, or was written by a newer version of this package.
    """
    dropped: dict[str, set[str]] = {}
    for record in _records(store, source):
        for shard, keys in record["shards"].items():
            dropped.setdefault(shard, set()).update(keys)
    return {shard: frozenset(keys) for shard, keys in dropped.items()}


def read_links(store: Store, source: str) -> frozenset[str]:
    """The hashes of links that were taken down, over every list of a source."""
    return frozenset(h for record in _records(store, source) for h in record.get("links", ()))


def link_hash(link: str) -> str:
    """32 hex digits over a link's canonical form."""
    return hash_of(canonical(link))


def hash_of(form: str) -> str:
    """`link_hash` of a link that is in its canonical form."""
    return sha256(form.encode("utf-8", "surrogatepass"))[:32]


def _records(store: Store, source: str) -> Iterator[dict[str, Any]]:
    for name in store.names(f"{source}/drops"):
        yield _record(store, f"{source}/drops/{name}")


def _record(store: Store, path: str) -> dict[str, Any]:
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
    return record  # pyright: ignore


def inputs(dropped: Iterable[str]) -> dict[str, str]:
    """What a shard's fingerprint says of its dropped keys: nothing where there are none."""
    keys = sorted(dropped)
    return {"dropped": fingerprint(keys)} if keys else {}

"""Shards that could not be made, and why: <group>/failures/<shard>.json, until they are made."""

from __future__ import annotations

from pipeline.core.store import Store


def record(store: Store, groups: list[str], shard: str, error: str, attempts: int) -> None:
    """Marks a shard as failed in each of the groups that it was to fill."""
    for group in groups:
        store.write_json(_path(group, shard), {"error": error, "attempts": attempts})


def clear(store: Store, groups: list[str], shard: str) -> None:
    for group in groups:
        store.delete(_path(group, shard))
        store.remove_empty(f"{group}/failures")


def read(store: Store, group: str) -> dict[str, str]:
    """Shard id -> why it failed the last time."""
    names = store.names(f"{group}/failures")
    return {
        name.removesuffix(".json"): store.read_json(f"{group}/failures/{name}")["error"]
        for name in names
    }


def _path(group: str, shard: str) -> str:
    return f"{group}/failures/{shard}.json"

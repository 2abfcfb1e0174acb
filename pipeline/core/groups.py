"""A group's index.json and manifest.json, assembled from its commits."""

from __future__ import annotations

from collections import Counter

from pipeline.core import mds, summary
from pipeline.core.commits import Commit, scan
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.core.store import Store, canonical_json


def publish(store: Store, group: str, manifest: Manifest | None) -> None:
    """Writes manifest.json, then index.json, over every committed shard.

    index.json carries, under "inputs", one record for each of its shards: the input shard, its
    split and the parquet that maps keys to rows. Two runs may publish at once: each looks again
    after it wrote, so the last one to write has seen every commit.

    Args:
        manifest: the group's passport; None for tars and captions, which have no index.
    """
    while True:
        before = store.entries(f"{group}/commits")
        summary.write(store, group)  # first: what it read, the index need not read again
        if manifest is not None:
            _publish(store, group, manifest)
        if store.entries(f"{group}/commits") == before:
            return


def _publish(store: Store, group: str, manifest: Manifest) -> None:
    splits: Counter[str] = Counter()
    shards: list[bytes] = []  # as JSON: a tenth of what ten thousand dicts take
    inputs: list[bytes] = []
    for commit in scan(store, group):
        if commit.index is not None:
            splits[commit.split] += commit.samples
            shards.append(canonical_json(commit.index))
            inputs.append(canonical_json(index_input(commit)))
    counts = {"samples": splits.total(), "splits": dict(splits), "shards": len(shards)}
    write_manifest(store, group, manifest.model_copy(update=counts))
    store.write(f"{group}/index.json", mds.index(shards, inputs))


def index_input(commit: Commit) -> dict[str, str]:
    """What index.json says of a shard beside its MDS entry."""
    return {"shard": commit.shard, "split": commit.split, "keys": commit.file(".parquet")}

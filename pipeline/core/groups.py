"""A group's index.json and manifest.json, assembled from its commits."""

from __future__ import annotations

from pipeline.core import mds
from pipeline.core.commits import Commit, read_commits
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.core.store import Store


def publish(store: Store, group: str, manifest: Manifest) -> None:
    """Writes manifest.json, then index.json, over every committed shard.

    index.json carries, under "inputs", one record for each of its shards: the input shard, its
    split and, in text groups, the parquet that maps keys to rows.
    """
    commits = [c for c in read_commits(store, group).values() if c.index is not None]
    splits: dict[str, int] = {}
    for commit in commits:
        splits[commit.split] = splits.get(commit.split, 0) + commit.samples
    counts = {
        "samples": sum(splits.values()),
        "splits": splits,
        "shards": len(commits),
    }
    write_manifest(store, group, manifest.model_copy(update=counts))
    entries = [commit.index for commit in commits if commit.index is not None]
    extra = {"inputs": [_input(commit) for commit in commits]}
    store.write_json(f"{group}/index.json", mds.index(entries, extra))


def _input(commit: Commit) -> dict[str, str]:
    record = {"shard": commit.shard, "split": commit.split}
    join = [name for name in commit.files if name.endswith(".parquet") and "/" not in name]
    return record | ({"keys": join[0]} if join else {})

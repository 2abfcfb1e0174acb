"""A group's index.json and manifest.json, assembled from its commits."""

from __future__ import annotations

from collections import Counter

from pipeline.core import facts, mds, summary
from pipeline.core.commits import Commit, scan
from pipeline.core.errors import SettingError
from pipeline.core.manifest import read_manifest, write_manifest
from pipeline.core.store import Store, canonical_json


def publish(store: Store, group: str) -> str:
    """Writes manifest.json, then index.json, over every committed shard.

    index.json carries, under "inputs", one record for each of its shards: the input shard, its
    split and the parquet that maps keys to rows. Two runs may publish at once: each looks again
    after it wrote, so the last one to write has seen every commit.

    Tars and captions have neither. A group whose shards clash, as while it is made anew, keeps
    those that it has: they describe the generation before, whose files are still there.

    Returns:
        Why the group was not published; "" where it was.
    """
    while True:
        before = store.entries(f"{group}/commits")
        summary.write(store, group)  # first: what it read, the index need not read again
        mixed = _publish(store, group) if facts.indexed(group) else ""
        if store.entries(f"{group}/commits") == before:
            return mixed


def _publish(store: Store, group: str) -> str:
    splits: Counter[str] = Counter()
    shards: list[bytes] = []  # as JSON: a tenth of what ten thousand dicts take
    inputs: list[bytes] = []
    found: Counter[str] = Counter()
    for commit in scan(store, group):
        found[facts.of(group, commit.inputs)] += 1
        if commit.index is not None:
            splits[commit.split] += commit.samples
            shards.append(canonical_json(commit.index))
            inputs.append(canonical_json(index_input(commit)))
    if mixed := mixture(found):
        return mixed
    if not any(found):
        return "its commits do not say what made them"
    counts = {"samples": splits.total(), "splits": dict(splits), "shards": len(shards)}
    manifest = facts.manifest(group, filter(None, found), counts)
    if _describes_others(store, group, facts.of_manifest(manifest)):
        # A run that dies between the two writes must not leave this manifest beside that index.
        store.delete(f"{group}/index.json")
    write_manifest(store, group, manifest)
    store.write(f"{group}/index.json", mds.index(shards, inputs))
    return ""


def _describes_others(store: Store, group: str, wanted: str) -> bool:
    """Whether the manifest that is there has other facts."""
    try:
        return bool(facts.clashes(wanted, facts.of_manifest(read_manifest(store, group))))
    except FileNotFoundError:
        return False
    except (SettingError, ValueError, TypeError, AttributeError):
        return True


def mixture(found: Counter[str]) -> str:
    """How shards of one group clash, in words; "" where they do not.

    Those of one VAE in float32 and bfloat16 do not: no run adds them to each other, but groups of
    an earlier release have them.

    Args:
        found: facts -> shards.
    """
    (most, count), *others = found.most_common() or [("", 0)]
    for other, number in others:
        if lines := facts.clashes(other, most, rounding=False):
            return (
                f"{count} of its shards were made by or with others than {number} "
                f"({'; '.join(lines)})"
            )
    return ""


def index_input(commit: Commit) -> dict[str, str]:
    """What index.json says of a shard beside its MDS entry."""
    return {"shard": commit.shard, "split": commit.split, "keys": commit.file(".parquet")}

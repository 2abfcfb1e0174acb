"""Commit records: what is done. The only mutable object of a shard, written last and atomically.

A file that no commit names does not exist for anyone. What is left to do is the input shards
without a commit whose fingerprint matches; there is no database. Records hold no times, so that an
interrupted and an uninterrupted run leave the same bytes; times are in the run reports.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.core.errors import SettingError
from pipeline.core.samples import InputShard, Reject
from pipeline.core.store import Store, fingerprint, sha256

SCHEMA = 1


@dataclass(frozen=True)
class Commit:
    """One finished shard of one group."""

    shard: str
    split: str
    fingerprint: str
    inputs: dict[str, Any]  # what the fingerprint is over: config, weights, upstream fingerprints
    files: dict[str, dict[str, Any]]  # name in the group -> {"bytes": int, "sha256": str}
    samples: int
    keys_sha256: str  # over the sample keys in order, newline-separated
    rejects: dict[str, int] = field(default_factory=dict)  # reason -> count
    index: dict[str, Any] | None = None  # the shard's entry in index.json (MDS groups)
    counters: dict[str, int] = field(default_factory=dict)  # further counts a stage reports
    schema: int = SCHEMA


def read_commits(store: Store, group: str) -> dict[str, Commit]:
    """Shard id -> commit, in order of id.

    Raises:
        SettingError: a record was written by a newer version of this package.
    """
    commits = {}
    for name in store.names(f"{group}/commits"):
        path = f"{group}/commits/{name}"
        record = store.read_json(path)
        if record.get("schema", 0) > SCHEMA:
            raise SettingError(
                f"{store.url(path)}: schema {record['schema']}, this version reads up to {SCHEMA}; "
                "upgrade the package"
            )
        commits[record["shard"]] = Commit(**record)
    return commits


def write_shard(
    store: Store,
    group: str,
    shard: InputShard,
    inputs: dict[str, Any],
    files: dict[str, bytes],
    keys: list[str],
    rejects: list[Reject],
    index: dict[str, Any] | None = None,
    counters: dict[str, int] | None = None,
) -> Commit:
    """Data files first, then the rejects, last the commit record.

    A run that dies on the way leaves files that no commit names; the rerun writes the same names.
    """
    for name, data in files.items():
        store.write(f"{group}/{name}", data)
    reasons: dict[str, int] = {}
    for reject in rejects:
        reasons[reject.reason] = reasons.get(reject.reason, 0) + 1
    hashes = {name: {"bytes": len(d), "sha256": sha256(d)} for name, d in files.items()}
    if rejects:
        data = _rejects_table(rejects)
        name = f"rejects/{shard.id}.parquet"
        store.write(f"{group}/{name}", data)
        hashes[name] = {"bytes": len(data), "sha256": sha256(data)}
    commit = Commit(
        shard=shard.id,
        split=shard.split,
        fingerprint=fingerprint(inputs),
        inputs=inputs,
        files=hashes,
        samples=len(keys),
        keys_sha256=sha256("\n".join(keys).encode()),
        rejects=dict(sorted(reasons.items())),
        index=index,
        counters=counters or {},
    )
    store.write_json(f"{group}/commits/{shard.id}.json", asdict(commit))
    return commit


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Why a shard is stale: "name: old -> new" for every input that differs."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changes.append(f"{prefix}{key}: {_short(a)} -> {_short(b)}")
    return changes


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _rejects_table(rejects: list[Reject]) -> bytes:
    import pyarrow as pa

    from pipeline.core.tables import to_parquet

    return to_parquet(pa.Table.from_pylist([asdict(reject) for reject in rejects]))

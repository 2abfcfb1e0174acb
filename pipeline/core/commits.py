"""Commit records: what is done. The only mutable object of a shard, written last and atomically.

A file that no commit names does not exist for anyone. What is left to do is the input shards
without a commit whose fingerprint matches; there is no database. Records hold no times, so that an
interrupted and an uninterrupted run leave the same bytes; times are in the run reports.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from pipeline.core import layout, mends, summary
from pipeline.core.errors import BrokenShard, NewerSchema, TooManyRejects
from pipeline.core.samples import InputShard, Reject
from pipeline.core.staged_file import StagedFile
from pipeline.core.store import Store, fingerprint, sha256

SCHEMA = 2  # that is read; a record says 2 only where it has what 1 does not know
MAX_REJECT_RATE = 0.9  # of a shard; a whole shard of dead links is an outage, not bad pictures


@dataclass(frozen=True)
class Commit:
    """One finished shard of one group."""

    shard: str
    split: str
    fingerprint: str
    inputs: dict[str, Any]  # what the fingerprint is over: config, weights, upstream contents
    files: dict[str, dict[str, Any]]  # name in the group -> {"bytes": int, "sha256": str}
    samples: int
    keys_sha256: str  # over the sample keys in order, newline-separated
    rejects: dict[str, int] = field(default_factory=dict)  # reason -> count
    index: dict[str, Any] | None = None  # the shard's entry in index.json (MDS groups)
    counters: dict[str, int] = field(default_factory=dict)  # further counts a stage reports
    #: Content of the generation that this one replaces with the same pictures and captions in
    #: other bytes: what was made of that one is as good of this one.
    reads_as: str = ""
    schema: int = 1

    def content(self) -> str:
        """16 hex digits over the data files: what a stage that reads them depends on.

        Not the fingerprint: a shard redone to the same bytes leaves what was made of it valid, and
        one redone to others (a refetched link) does not.
        """
        if self.reads_as:
            return self.reads_as
        hashes = {n: f["sha256"] for n, f in self.files.items() if not n.startswith("rejects/")}
        return fingerprint(hashes)

    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())

    def file(self, ending: str) -> str:
        """The name of its data file with this ending.

        Raises:
            KeyError: it has none.
        """
        for name in self.files:
            if name.endswith(ending) and not name.startswith("rejects/"):
                return name
        raise KeyError(ending)


def scan(store: Store, group: str) -> Iterator[Commit]:
    """Every commit of a group, in order of shard, one at a time.

    Raises:
        BrokenShard: a record is damaged.
        NewerSchema: a record was written by a newer version of this package.
    """
    for path, data in summary.records(store, group):
        yield _parse(store, path, data)


def read_commits(store: Store, group: str) -> dict[str, Commit]:
    """Shard id -> commit, in order of id: all in memory, for small groups."""
    return {commit.shard: commit for commit in scan(store, group)}


def read_commit(store: Store, group: str, shard: str) -> Commit | None:
    """One shard's commit, or None where it has none.

    Raises:
        BrokenShard: the record is damaged.
        NewerSchema: it was written by a newer version of this package.
    """
    path = commit_path(group, shard)
    try:
        return _parse(store, path, store.read(path))
    except FileNotFoundError:
        return None


def read_file(store: Store, group: str, commit: Commit, ending: str) -> bytes:
    """The committed data file with this ending, as it was committed.

    Raises:
        BrokenShard: it is gone, or its bytes are not those of the record.
    """
    return read_named(store, group, commit, commit.file(ending))


def read_named(store: Store, group: str, commit: Commit, name: str) -> bytes:
    """`read_file` by the whole name, rejects included."""
    try:
        data = store.read(f"{group}/{name}")
    except FileNotFoundError:
        raise broken(store, f"{group}/{name}", "is missing") from None
    if sha256(data) != commit.files[name]["sha256"]:
        raise broken(store, f"{group}/{name}", _difference(len(data), commit.files[name]))
    return data


def _difference(size: int, facts: dict[str, Any]) -> str:
    if size != facts["bytes"]:
        return f"has {size} bytes, its commit record says {facts['bytes']}"
    return "differs from its commit record (sha256)"


def broken(store: Store, path: str, what: str) -> BrokenShard:
    """The error of a file of a shard: what is wrong with it, and the remedy."""
    return BrokenShard(f"{store.url(path)} {what}; {remedy(store, path)}")


def remedy(store: Store, path: str) -> str:
    """What to do about a damaged file of a group."""
    words = ["pipeline", "verify", "--repair", "--source", path.split("/")[0]]
    if store.root != Store(layout.DEFAULT_ROOT).root:
        words += ["--root", store.root]
    return f"run `{shlex.join(words)}`, which says what to do again"


def write_shard(
    store: Store,
    group: str,
    shard: InputShard,
    inputs: dict[str, Any],
    files: Mapping[str, bytes | StagedFile],
    keys: list[str],
    rejects: list[Reject],
    index: dict[str, Any] | None = None,
    counters: dict[str, int] | None = None,
    max_reject_rate: float = MAX_REJECT_RATE,
    reads_as: str = "",
) -> Commit:
    """Data files first, then the rejects, last the commit record.

    A run that dies on the way leaves files that no commit names; the rerun writes the same names.

    Raises:
        TooManyRejects: more than `max_reject_rate` of the shard's samples were rejected.
    """
    reasons = check_rejects(rejects, len(keys), max_reject_rate)
    if rejects:
        files = {**files, f"rejects/{shard.id}-{fingerprint(inputs)}.parquet": _table(rejects)}
    described = {name: _described(data) for name, data in files.items()}
    for name, data in files.items():
        path = f"{group}/{name}"
        store.write(path, data) if isinstance(data, bytes) else store.place(data.path, path)
    commit = Commit(
        shard=shard.id,
        split=shard.split,
        fingerprint=fingerprint(inputs),
        inputs=inputs,
        files=described,
        samples=len(keys),
        keys_sha256=keys_hash(keys),
        rejects=reasons,
        index=index,
        counters={**(counters or {}), mends.COUNTER: mends.MENDS},
        reads_as=reads_as,
        schema=SCHEMA if reads_as else 1,
    )
    write_commit(store, group, commit)
    return commit


def write_commit(store: Store, group: str, commit: Commit) -> None:
    """The record alone, over the one that is there; its data files are there already."""
    record = asdict(commit)
    if not commit.reads_as:
        del record["reads_as"]  # versions that do not know it read the record too
    store.write_json(commit_path(group, commit.shard), record)


def check_rejects(rejects: list[Reject], kept: int, max_reject_rate: float) -> dict[str, int]:
    """Reason -> count.

    Raises:
        TooManyRejects: they are more than `max_reject_rate` of rejected and kept samples.
    """
    reasons = dict(sorted(Counter(reject.reason for reject in rejects).items()))
    judged = [reject for reject in rejects if not reject.foreseen]
    total = len(judged) + kept
    if len(judged) > max_reject_rate * total:
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise TooManyRejects(
            f"{len(judged)} of {total} samples rejected ({found}; e.g. {judged[0].key}: "
            f"{judged[0].detail}), more than max_reject_rate={max_reject_rate}; not committed"
        )
    return reasons


def commit_path(group: str, shard: str) -> str:
    return f"{group}/commits/{shard}.json"


def keys_hash(keys: list[str]) -> str:
    return sha256("\n".join(keys).encode())


def _described(data: bytes | StagedFile) -> dict[str, Any]:
    """What a commit says of a data file."""
    if isinstance(data, StagedFile):
        return {"bytes": data.bytes, "sha256": data.sha256()}
    return {"bytes": len(data), "sha256": sha256(data)}


def plain_stem(
    store: Store, group: str, shard: str, files: Mapping[str, bytes | StagedFile]
) -> str:
    """The stem of data files that other tools find by img2dataset's names: "00000".

    Those names are free for the first generation of a shard. A later one whose bytes differ gets a
    name of its own, so that no committed file is ever overwritten.

    Args:
        files: ending -> what it will hold, e.g. {".tar": ...}.
    """
    commit = read_commit(store, group, shard)
    hashes = {ending: _described(data)["sha256"] for ending, data in files.items()}
    named = {} if commit is None else commit.files
    same = all(named.get(shard + e, {}).get("sha256") == hashes[e] for e in hashes)
    return shard if commit is None or same else f"{shard}-{fingerprint(hashes)}"


#: Inputs that name the content of what a stage read: their values say nothing to a person.
_UPSTREAM = {
    "images": "images were made anew",
    "captions_made": "captions were made anew",
    "latents_made": "latents were made anew",
    "text_made": "text was made anew",
    "official": "the official shard is another",
    "shard": "its source lists other pictures for it",
}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Why a shard is stale: "name: old -> new" for every input that differs, in words."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        name = f"{prefix}{key}"
        if key in _UPSTREAM and a and b:
            changes.append(_UPSTREAM[key])
        elif key == "official_form":
            changes.append(
                "an earlier release applied the VAE's shift, which the official code lacks"
            )
        elif key == "mended":
            changes += [mends.REASONS.get(kind, kind) for kind in b or () if kind not in (a or ())]
        elif key == "dropped":
            changes.append("samples were dropped")
        elif isinstance(a, dict) and isinstance(b, dict):
            changes += differences(a, b, f"{name}.")
        elif key.endswith("sha256"):
            changes.append(f"{name.removesuffix('_sha256').replace('.', ' ')} hash differs")
        else:
            changes.append(f"{name}: {_short(a)} -> {_short(b)}")
    return changes


@functools.cache
def _records() -> TypeAdapter[Commit]:
    return TypeAdapter(Commit)


def _parse(store: Store, path: str, data: bytes) -> Commit:
    require_schema(store, path, data, "schema", SCHEMA)
    try:
        commit = _records().validate_json(data, strict=True)
        for name, facts in commit.files.items():
            if not isinstance(facts.get("bytes"), int) or not isinstance(facts.get("sha256"), str):
                raise ValueError(f"files.{name}: no bytes or sha256")
    except ValueError as error:
        raise broken(store, path, f"is no commit record ({reason(error)})") from error
    return commit


def require_schema(store: Store, path: str, data: bytes, key: str, newest: int) -> None:
    """Raises NewerSchema where a JSON file says that a newer version of this package wrote it."""
    try:
        schema = json.loads(data).get(key, 0)
        newer = schema > newest
    except (ValueError, AttributeError, TypeError):
        return  # what it is instead, its reader says
    if newer:
        raise NewerSchema(
            f"{store.url(path)}: schema {schema}, this version reads up to {newest}; "
            "upgrade the package"
        )


def reason(error: BaseException) -> str:
    """What is wrong with a record, in a line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    else:
        text = str(error)
    return " ".join(text.split())[:200]


def _short(value: Any) -> str:
    """A value for people: words, not Python."""
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value)) or "none"
    elif isinstance(value, dict):
        value = ",".join(f"{key}={item}" for key, item in sorted(value.items())) or "none"
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _table(rejects: list[Reject]) -> bytes:
    import pyarrow as pa

    from pipeline.core.tables import to_parquet

    names = ("key", "stage", "reason", "detail")
    columns = {name: pa.array([getattr(r, name) for r in rejects], pa.string()) for name in names}
    places = pa.array([_place(reject) for reject in rejects], pa.string())
    return to_parquet(pa.table({**columns, "place": places}))


def _place(reject: Reject) -> str | None:
    """A reject's file or link for people, without what may be secret in a link."""
    text = "" if reject.ref is None else reject.ref.url
    if "://" in text:
        try:
            parts = urlsplit(text)
            host = parts.netloc.rpartition("@")[2]
            text = parts._replace(netloc=host, query="", fragment="").geturl()
        except ValueError:  # no link: what is secret in it nobody can tell
            text = ""
    return text.encode("utf-8", "backslashreplace").decode() or None

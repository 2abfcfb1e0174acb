"""The commit records of a group on an object store, in one object beside them.

Reading ten thousand small objects takes minutes, listing them seconds. The summary holds every
record with the version (ETag) that the listing shows, so a reader takes from it what is unchanged
and asks for the rest alone. It is a cache: it may be stale, or missing, and nobody trusts it.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator

from pipeline.core.store import Entry, Store

NAME = "commits.jsonl.gz"


def records(store: Store, group: str) -> Iterator[tuple[str, bytes]]:
    """(path, JSON) of every commit record, in order of name."""
    if store.local:
        folder = f"{group}/commits"
        paths = [f"{folder}/{name}" for name in store.names(folder)]
        for path, data in zip(paths, store.read_many(paths), strict=True):
            if data is not None:  # else it was taken back since the listing
                yield path, data
        return
    for entry, data in _records(store, group):
        yield entry.path, data


def write(store: Store, group: str) -> None:
    """Brings the summary up to date, where there is an object store to spare requests to."""
    if store.local:
        return
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
        for entry, data in _records(store, group):
            if entry.version:
                line = {"name": _name(entry), "version": entry.version, "record": json.loads(data)}
                file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
    store.write(f"{group}/{NAME}", buffer.getvalue())


def _records(store: Store, group: str) -> Iterator[tuple[Entry, bytes]]:
    entries = [e for e in store.entries(f"{group}/commits") if e.path.endswith(".json")]
    if not entries:
        return
    known = _known(store, group, {_name(entry): entry.version for entry in entries})
    missing = [entry for entry in entries if _name(entry) not in known]
    read = store.read_many([entry.path for entry in missing])
    for entry in entries:
        data = known.pop(_name(entry), None)
        if data is None:
            data = next(read)
        if data is not None:  # else it was taken back since the listing
            yield entry, data


def _known(store: Store, group: str, versions: dict[str, str]) -> dict[str, bytes]:
    """name -> record, of those whose version is the listed one."""
    try:
        data = store.read(f"{group}/{NAME}")
    except FileNotFoundError:
        return {}
    known = {}
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            for line in file:
                row = json.loads(line)
                if versions.get(row["name"]) == row["version"] != "":
                    known[row["name"]] = json.dumps(row["record"]).encode()
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError):
        return {}  # damaged, or of another version: the records themselves are there
    return known


def _name(entry: Entry) -> str:
    return entry.path.rsplit("/", 1)[1]

"""One input shard without some of its samples, in every group that has it.

Each group's data files are copied without them, under new names; then the commits are replaced, the
last made first. A commit names the content of what it was made from, and gets that of the new
files, so nothing is stale afterwards. Whoever dies on the way leaves commits whose inputs can still
be told: pictures, which all others name, are replaced last, and made anew they are the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa

from pipeline.core import drops
from pipeline.core.commits import (
    Commit,
    keys_hash,
    plain_stem,
    read_commit,
    read_file,
    read_named,
    write_commit,
)
from pipeline.core.errors import BrokenShard
from pipeline.core.mds import decode_shard, encode_shard, stored, unpack
from pipeline.core.samples import FAILED
from pipeline.core.staged_file import StagedFile, staged_file
from pipeline.core.store import Store, fingerprint, sha256
from pipeline.core.tables import from_parquet, to_parquet
from pipeline.core.tars import read_samples, write_tar
from pipeline.dropping.traces import NOTES, in_shard, without_names

ORDER = ("images", "captions", "latents", "text", "official")  # each made from those before it


def purge_shard(
    store: Store, groups: list[str], shard: str, keys: frozenset[str]
) -> dict[str, int]:
    """Removes samples from a shard of every group.

    Returns:
        Group -> samples that it held of them, for those that were rewritten.

    Raises:
        BrokenShard: a file is gone or damaged.
    """
    removed: dict[str, int] = {}
    contents: dict[str, str] = {}  # of the group's old commit -> of the new one
    made: list[tuple[str, Commit]] = []
    for group in sorted(groups, key=_place):
        commit = read_commit(store, group, shard)
        if commit is None:
            continue
        inputs = _with_new_contents(commit.inputs, contents) | drops.inputs(keys)
        held = any(in_shard(store, group, commit, keys))
        if not held and inputs == commit.inputs:
            continue
        copied = _copied(store, group, commit, inputs, keys)
        contents[commit.content()] = copied.content()
        made.append((group, copied))
        removed[group] = commit.samples - copied.samples
    for group, commit in reversed(made):
        write_commit(store, group, commit)
    return removed


def _place(group: str) -> tuple[int, str]:
    return ORDER.index(group.split("/")[1]), group


def _with_new_contents(value: Any, contents: dict[str, str]) -> Any:
    """Inputs in which the contents that were replaced are named by their new ones."""
    if isinstance(value, dict):
        return {key: _with_new_contents(v, contents) for key, v in value.items()}
    return contents.get(value, value) if isinstance(value, str) else value


def _copied(
    store: Store, group: str, commit: Commit, inputs: dict[str, Any], keys: frozenset[str]
) -> Commit:
    """Writes the shard's data files without the keys; the commit of them, which is not written."""
    with contextlib.ExitStack() as stack:
        copy = _Copy(store, group, commit, inputs, keys, stack)
        kind = group.split("/")[1]
        found = copy.images() if kind == "images" else copy.table() if kind == "captions" else None
        return copy.commit(found or copy.mds())


@dataclass
class _Content:
    """What a shard is to hold."""

    files: dict[str, bytes | StagedFile]
    keys: list[str]
    index: dict[str, Any] | None = None
    counters: dict[str, int] | None = None


class _Copy:
    def __init__(
        self,
        store: Store,
        group: str,
        commit: Commit,
        inputs: dict[str, Any],
        keys: frozenset[str],
        stack: contextlib.ExitStack,
    ) -> None:
        self.store, self.group, self.old = store, group, commit
        self.inputs, self.keys, self.stack = inputs, keys, stack
        # A name of its own even where the inputs said already that the samples are out.
        unnamed = inputs if inputs != commit.inputs else [inputs, "purged"]
        self.stem = f"{commit.shard}-{fingerprint(unnamed)}"

    def commit(self, content: _Content) -> Commit:
        files = dict(content.files)
        reasons: dict[str, int] = {}
        rejects = [name for name in self.old.files if name.startswith("rejects/")]
        for name in rejects:
            table = self._kept(from_parquet(read_named(self.store, self.group, self.old, name)))
            counts = table["reason"].value_counts().to_pylist()
            reasons = dict(sorted((row["values"], row["counts"]) for row in counts))
            if table.num_rows:
                files[f"rejects/{self.stem}.parquet"] = to_parquet(table)
        described = {}
        for name, data in files.items():
            path = f"{self.group}/{name}"
            if isinstance(data, bytes):
                described[name] = {"bytes": len(data), "sha256": sha256(data)}
                self.store.write(path, data)
            else:
                described[name] = {"bytes": data.bytes, "sha256": data.sha256()}
                self.store.place(data.path, path)
        counters = self.old.counters if content.counters is None else content.counters
        return replace(
            self.old,
            fingerprint=fingerprint(self.inputs),
            inputs=self.inputs,
            files=described,
            samples=len(content.keys),
            keys_sha256=keys_hash(content.keys),
            rejects=reasons,
            index=content.index,
            counters=counters,
            reads_as="",  # no generation before it had these pictures alone
            schema=1,
        )

    def images(self) -> _Content:
        """A tar, a parquet and img2dataset's statistics."""
        keys: list[str] = []
        tar = self.stack.enter_context(staged_file(self.store, self.group))

        def members() -> Iterator[tuple[str, bytes]]:
            data = read_file(self.store, self.group, self.old, ".tar")
            for key, fields in read_samples(data):
                if key not in self.keys:
                    keys.append(key)
                    for extension, value in fields.items():
                        yield f"{key}.{extension}", value

        write_tar(cast(IO[bytes], tar), members())
        tar.close()
        table = self._table()
        files = {".tar": tar, ".parquet": to_parquet(table)}
        stem = plain_stem(self.store, self.group, self.old.shard, files)
        self._statistics(stem, table)
        return _Content({stem + ending: data for ending, data in files.items()}, keys)

    def table(self) -> _Content:
        """Captions: a parquet alone."""
        table = self._table()
        files = {".parquet": to_parquet(table)}
        stem = plain_stem(self.store, self.group, self.old.shard, files)
        keys = list(dict.fromkeys(table["key"].to_pylist()))
        return _Content({f"{stem}.parquet": files[".parquet"]}, keys)

    def mds(self) -> _Content:
        """An MDS shard of the rows that a key points at yet, and the parquet of keys."""
        table = self._table()
        rows = table["row"].to_numpy()
        used = np.unique(rows)
        files: dict[str, bytes | StagedFile] = {}
        entry, old = None, self.old.index
        if len(used):
            if old is None:
                raise BrokenShard(f"{self.group}/{self.old.shard}: keys, but no MDS shard")
            packed = read_file(self.store, self.group, self.old, stored(old)["basename"])
            header, samples = decode_shard(unpack(packed, old))
            columns = dict(zip(header["column_names"], header["column_encodings"], strict=True))
            wanted = set(used.tolist())
            kept = (sample for row, sample in enumerate(samples) if row in wanted)
            data, entry = encode_shard(
                columns, kept, f"{self.stem}.mds", old["hashes"], old["compression"]
            )
            files[stored(entry)["basename"]] = data
        place = table.schema.get_field_index("row")
        numbers = pa.array(np.searchsorted(used, rows), table.schema.field("row").type)
        files[f"{self.stem}.parquet"] = to_parquet(table.set_column(place, "row", numbers))
        counters = dict(self.old.counters)
        if "distinct_captions" in counters:
            counters["distinct_captions"] = len(used)
        return _Content(files, table["key"].to_pylist(), entry, counters)

    def _table(self) -> pa.Table:
        return self._kept(from_parquet(read_file(self.store, self.group, self.old, ".parquet")))

    def _kept(self, table: pa.Table) -> pa.Table:
        """Without the keys' rows, and without their names in what is said of other samples."""
        rows = [row for row in table.to_pylist() if row["key"] not in self.keys]
        for row in rows:
            for column in row.keys() & NOTES:
                row[column] = row[column] and without_names(row[column], self.keys)
        return pa.Table.from_pylist(rows, schema=table.schema)

    def _statistics(self, stem: str, table: pa.Table) -> None:
        """img2dataset's, which no commit names: times as they were, counts as they are now."""
        old = self.old.file(".tar").removesuffix(".tar")
        try:
            record = self.store.read_json(f"{self.group}/{old}_stats.json")
        except FileNotFoundError:
            return
        counts = {r["values"]: r["counts"] for r in table["status"].value_counts().to_pylist()}
        good, failed = counts.get("success", 0), counts.get(FAILED, 0)
        record |= {
            "count": table.num_rows,
            "successes": good,
            "failed_to_download": failed,
            "failed_to_resize": table.num_rows - good - failed,
            "status_dict": counts,
        }
        self.store.write_json(f"{self.group}/{stem}_stats.json", record)

"""Captions that upstream keeps in one large file: sorted once a host, so that a shard of the
source reads only its own rows.

The sorted file is a parquet in the scratch folder with small row groups. It is made by whoever
needs it first, in memory for a fraction of it, and stays for the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.core.staged_file import scratch
from pipeline.core.store import temporary_name
from pipeline.sources.files.scratch_files import locked

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1  # of the sorted files; raise it when what is in them changes
PENDING = 500  # rows of a bucket in memory before they are written
GROUP = 10_000  # rows of a row group: what is read for a row at least


class Row(NamedTuple):
    number: int  # what shards ask for: a range of it
    name: str  # of the picture's file
    caption: str
    score: float = 0.0  # whatever the source filters by


def sorted_rows(identity: str, make: Callable[[], Iterable[Row]], span: int) -> Path:
    """The parquet of all rows in order of number; rows of equal number as they came.

    Args:
        identity: of the content, as transfer.stamped gives it. The file is made once for each.
        make: gives the rows, in any order. Called only where the file is not there yet.
        span: numbers that are sorted together, in memory; numbers divided by it give at most a few
            hundred buckets, each an open file.
    """
    digest = hashlib.blake2b(f"{VERSION} {identity}".encode(), digest_size=8).hexdigest()
    target = scratch() / f"{digest}-captions.parquet"
    if not target.exists():
        with locked(target):
            if not target.exists():
                _make(target, make(), span)
    else:
        os.utime(target)  # in use: see scratch_files.remove_abandoned
    return target


def rows_of(path: Path, low: int, high: int) -> list[Row]:
    """The rows whose number is from `low` to `high`, both included."""
    import pyarrow.parquet as pq

    bounds = [("number", ">=", low), ("number", "<=", high)]
    table = pq.read_table(path, filters=bounds, use_threads=False)
    return [Row(**row) for row in table.to_pylist()]


def _make(target: Path, rows: Iterable[Row], span: int) -> None:
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        buckets: dict[int, _Bucket] = {}
        for row in rows:
            number = row.number // span
            if number not in buckets:
                buckets[number] = stack.enter_context(_bucket(target))
            buckets[number].add(row)
        temporary = target.with_name(temporary_name(target.name))
        stack.callback(temporary.unlink, missing_ok=True)
        with pq.ParquetWriter(temporary, _schema(), compression="zstd") as writer:
            for number in sorted(buckets):
                # A stable order: of several captions of a picture the first stays the first.
                table = (
                    buckets[number].read().sort_by([("number", "ascending"), ("at", "ascending")])
                )
                writer.write_table(table.drop_columns(["at"]), row_group_size=GROUP)
        os.replace(temporary, target)


class _Bucket:
    """Rows whose numbers are near each other, in a file that is gone when its block ends."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        self.count = 0
        self.pending: list[tuple] = []
        self.writer = pa.ipc.new_stream(path, _schema(at=True))

    def add(self, row: Row) -> None:
        self.pending.append((*row, self.count))
        self.count += 1
        if len(self.pending) >= PENDING:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa

        if self.pending:
            columns = [list(column) for column in zip(*self.pending, strict=True)]
            schema = _schema(at=True)
            arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
            self.writer.write_batch(pa.record_batch(arrays, schema=schema))
            self.pending = []

    def read(self) -> pa.Table:
        import pyarrow as pa

        self.flush()
        self.writer.close()
        with pa.ipc.open_stream(self.path) as reader:
            return reader.read_all()


@contextlib.contextmanager
def _bucket(target: Path) -> Iterator[_Bucket]:
    bucket = _Bucket(target.with_name(temporary_name(target.name)))
    try:
        yield bucket
    finally:
        bucket.writer.close()
        bucket.path.unlink(missing_ok=True)


def _schema(at: bool = False) -> pa.Schema:
    import pyarrow as pa

    fields = [
        ("number", pa.int64()),
        ("name", pa.string()),
        ("caption", pa.string()),
        ("score", pa.float64()),
    ]
    return pa.schema([*fields, ("at", pa.int64())] if at else fields)

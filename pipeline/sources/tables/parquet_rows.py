"""Parquet files of pictures: what their footers say, and their rows, a few at a time."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.tables.table_rows import python_values

MAGIC = b"PAR1"
TAIL = 64 << 10  # bytes of a file's end that hold most footers
_AT_ONCE = 16  # rows in memory
_BUFFER = 1 << 20  # bytes


class Footer(NamedTuple):
    """What a file holds, without a row of it."""

    groups: tuple[int, ...]  # rows of each row group
    schema: pa.Schema
    digest: str  # of names, sizes, places and statistics: another content has another one

    @property
    def rows(self) -> int:
        return sum(self.groups)


def footer_length(tail: bytes) -> int:
    """How many of a file's last bytes are its footer.

    Raises:
        ValueError: it is no parquet file.
    """
    if len(tail) < 12 or tail[-4:] != MAGIC:
        raise ValueError("no parquet file")
    return struct.unpack("<I", tail[-8:-4])[0] + 8


def parse_footer(footer: bytes) -> Footer:
    """A file's footer, from its last `footer_length` bytes.

    Raises:
        ValueError: it is broken.
    """
    # pyarrow reads footers of files only: this is one without rows.
    metadata = pq.read_metadata(pa.BufferReader(MAGIC + footer))
    groups = tuple(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))
    digest = hashlib.sha256(footer).hexdigest()[:16]
    return Footer(groups, metadata.schema.to_arrow_schema(), digest)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column's values, or those of its lists, can be read as a text: numbers can."""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def ranges(groups: Sequence[int], most: int) -> list[tuple[int, int]]:
    """(first row, rows) of parts of at most that many rows, at the bounds of row groups where
    these are smaller; the last one may be short."""
    found: list[tuple[int, int]] = []
    start = 0
    for rows in groups:
        if rows and found and found[-1][1] + rows <= most:
            found[-1] = (found[-1][0], found[-1][1] + rows)
        else:
            for first in range(start, start + rows, most):
                found.append((first, min(most, start + rows - first)))
        start += rows
    return found


def read_rows(path: Path, first: int, count: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows `first` to `first + count` of a file, as Python values; text that is no UTF-8 as bytes.

    Memory: the largest of its pages, packed and unpacked, and a few rows. Arrow writes up to 1,024
    pictures into a page, but never more than a row group has.
    """
    # With a buffer, pages are read one by one, and not a whole column of a row group at once.
    with pq.ParquetFile(path, memory_map=True, buffer_size=_BUFFER, pre_buffer=False) as file:
        wanted, skipped, start = [], 0, 0
        for number in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            if start < first + count and first < start + rows:
                wanted.append(number)
            elif start + rows <= first:
                skipped = start + rows
            start += rows
        batches = file.iter_batches(_AT_ONCE, wanted, columns, use_threads=False)
        rows = (row for batch in batches for row in _rows(batch))
        for number, row in enumerate(rows, skipped):
            if number >= first + count:
                return
            if number >= first:
                yield row


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    columns = [python_values(column) for column in batch.columns]
    for row in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))

"""Parquet as bytes: the same table always gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def key_rows(keys: Iterable[str], rows: Iterable[int], **more: pa.Array) -> bytes:
    """The parquet beside an MDS shard: each sample's key and its row there.

    Args:
        more: further columns, one value for each key.
    """
    columns = {"key": pa.array(list(keys), pa.string()), "row": pa.array(list(rows), pa.int32())}
    return to_parquet(pa.table({**columns, **more}))


def from_parquet(data: bytes) -> pa.Table:
    # Without Arrow's threads: a process that ends soon after them is aborted now and then
    # ("terminate called without an active exception", exit 134). One shard needs none.
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def read_keys(data: bytes) -> list[str]:
    """The column "key" of a parquet.

    Raises:
        ValueError: there is none, of text without gaps, or these are no bytes of a parquet.
    """
    return _column(_parsed(data), "key", pa.types.is_string).to_pylist()


def read_rows(data: bytes) -> tuple[list[str], np.ndarray]:
    """What `key_rows` wrote: keys, and the row of each, int64.

    Raises:
        ValueError: it is something else.
    """
    table = _parsed(data)
    rows = _column(table, "row", pa.types.is_integer).to_numpy().astype(np.int64)
    if len(rows) and rows.min() < 0:
        raise ValueError(f"row {rows.min()}")
    return _column(table, "key", pa.types.is_string).to_pylist(), rows


def _parsed(data: bytes) -> pa.Table:
    try:
        return from_parquet(data)
    except (pa.ArrowException, OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"no parquet that can be read ({text})") from error


def _column(table: pa.Table, name: str, kind: Callable[[pa.DataType], bool]) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise ValueError(f"no column {name!r}; there are {', '.join(table.column_names)}")
    column = table[name]
    if not kind(column.type) or column.null_count:
        raise ValueError(f"column {name!r} is {column.type} with {column.null_count} gaps")
    return column

"""Parquet as bytes: the same table always gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable

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

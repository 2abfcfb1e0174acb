"""Captions of a tar's samples in a parquet beside it, or in one of several tars."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.sources.tables.table_rows import BATCH, python_values, text_values


def captions_of(
    path: Path, key_column: str, column: str, names: set[str], own: bool
) -> dict[str, Any]:
    """Sample's name -> what stands in `column` for it.

    A key is a sample's whole name, "dogs/0001". Many tables have only its last part, as
    img2dataset's keys are; that is taken where it can mean one sample alone: in a table that is
    this tar's `own`, of a name that is in the tar once and in the table once.

    Raises:
        ValueError: the file has no such column.
    """
    bases = Counter(map(_base, names)) if own else Counter[str]()
    wanted = pa.array(sorted(names | bases.keys()), pa.string())
    found: dict[str, list[Any]] = {}
    with pq.ParquetFile(path, memory_map=True) as file:
        known = file.schema_arrow.names
        for name in (key_column, column):
            if name not in known:
                raise ValueError(f"has no column {name}; there are: {', '.join(known)}")
        # Without Arrow's threads: see pipeline.core.tables.
        for batch in file.iter_batches(BATCH, columns=[key_column, column], use_threads=False):
            keys = pa.array(
                [k if isinstance(k, str) else None for k in text_values(batch.column(key_column))],
                pa.string(),
            )
            mask = pc.is_in(keys, value_set=wanted)  # pyright: ignore
            cells = python_values(batch.column(column).filter(mask))
            for key, cell in zip(keys.filter(mask).to_pylist(), cells, strict=True):
                found.setdefault(key, []).append(cell)
    captions = {}
    for name in names:
        base = _base(name)
        if name in found:
            captions[name] = found[name][-1]
        elif bases[base] == 1 and len(found.get(base, ())) == 1:
            captions[name] = found[base][0]
    return captions


def _base(name: str) -> str:
    return name.rpartition("/")[2]

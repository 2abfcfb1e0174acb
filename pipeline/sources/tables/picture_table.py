"""A csv, tsv, jsonl or parquet file that names pictures and their captions."""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from typing import Any, NamedTuple

from pipeline.core.errors import SettingError, nearest
from pipeline.core.tables import from_parquet

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")


class Row(NamedTuple):
    """One picture of the table; "" where a value is missing."""

    name: str
    caption: str


def read_rows(data: bytes, table: str, image_col: str, caption_col: str | None) -> list[Row]:
    """The table's rows in its order.

    Args:
        data: the file's content; text is UTF-8.
        table: its name, whose ending says what it is.
        caption_col: None leaves every caption "".

    Raises:
        SettingError: another ending, an unreadable file, a missing column, or no rows.
    """
    ending = posixpath.splitext(table)[1].lower()
    if ending not in ENDINGS:
        raise SettingError(f"table={table}: known are {', '.join(ENDINGS)}")
    wanted = {"image_col": image_col} | ({"caption_col": caption_col} if caption_col else {})
    try:
        columns = _jsonl(data) if ending == ".jsonl" else _arrow(data, ending)
    except (ValueError, OSError) as error:  # pyarrow's errors are of both kinds
        text = " ".join(str(error).split())
        raise SettingError(f"table={table}: cannot be read: {text}") from error
    for setting, column in wanted.items():
        if column not in columns:
            raise SettingError(
                f"{setting}={column}: no such column in {table}{nearest(column, columns)}; "
                f"there are: {', '.join(columns)}"
            )
    names = columns[image_col]
    if not names:
        raise SettingError(f"table={table}: no rows in it")
    for setting, column in wanted.items():
        for number, value in enumerate(columns[column], 1):
            if isinstance(value, list | dict):
                kind = type(value).__name__
                raise SettingError(
                    f"{setting}={column}: a {kind} in row {number} of {table}; a picture has one "
                    "name and one text here (several captions: --kind hf reads lists)"
                )
    captions = columns[caption_col] if caption_col else [""] * len(names)
    return [Row(_plain(n), _plain(c)) for n, c in zip(names, captions, strict=True)]


def _plain(value: Any) -> str:
    """Lone halves of surrogate pairs, which JSON can hold, are in no encoding."""
    text = "" if value is None else str(value)
    return text.encode("utf-8", "replace").decode()


def _jsonl(data: bytes) -> dict[str, list[Any]]:
    # Not splitlines(), which also splits at what JSON allows inside a string.
    rows = [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return {
        name: [row.get(name) for row in rows] for name in dict.fromkeys(n for r in rows for n in r)
    }


def _arrow(data: bytes, ending: str) -> dict[str, list[Any]]:
    table = from_parquet(data) if ending == ".parquet" else _csv(data, ending)
    for name, count in Counter(table.column_names).items():
        if count > 1:
            raise ValueError(f"two columns of the name {name!r}")
    return {name: table[name].to_pylist() for name in table.column_names}


def _csv(data: bytes, ending: str) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    how = csv.ParseOptions(delimiter="\t" if ending == ".tsv" else ",", newlines_in_values=True)
    names = csv.open_csv(pa.py_buffer(data), parse_options=how).schema.names
    return csv.read_csv(
        pa.py_buffer(data),
        read_options=csv.ReadOptions(use_threads=False),
        parse_options=how,
        # "007" and "null" are captions like any other.
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )

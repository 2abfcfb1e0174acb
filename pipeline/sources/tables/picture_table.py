"""A csv, tsv, jsonl or parquet file that names pictures and their captions."""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections import Counter
from typing import NamedTuple

import pyarrow as pa

from pipeline.core.errors import SettingError, nearest
from pipeline.sources.files.archives import PICTURES
from pipeline.sources.tables.table_rows import Columns, columns, lines

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
_BROKEN = (ValueError, OSError, csv.Error, pa.ArrowException)
#: What a picture's name looks like.
_FILE = re.compile(rf"\s*\S[^\n]*\.(?:{'|'.join(sorted(PICTURES))})\s*", re.IGNORECASE).fullmatch


class Row(NamedTuple):
    """One picture of the table; "" where a value is missing."""

    name: str
    caption: str
    fault: str = ""  # why it is none: "line 7: …"


def read_rows(
    data: bytes, table: str, image_col: str, caption_col: str | None, encoding: str = "auto"
) -> list[Row]:
    """The table's rows in its order.

    Args:
        data: the file's content.
        table: its name, whose ending says what it is.
        caption_col: None leaves every caption "".

    Raises:
        SettingError: another ending, an unreadable file, a missing column, or no row of use.
    """
    ending = posixpath.splitext(table)[1].lower()
    if ending not in ENDINGS:
        raise SettingError(f"table={table}: known are {', '.join(ENDINGS)}")
    wanted = {"image_col": image_col} | ({"caption_col": caption_col} if caption_col else {})
    asked = Columns(tuple(wanted.values()), encoding=encoding, looks_right=_FILE)
    try:
        there = columns(io.BytesIO(data), ending[1:], encoding)
        _require(wanted, there, table)
        found = list(lines(io.BytesIO(data), ending[1:], asked))
    except SettingError:
        raise
    except _BROKEN as error:
        text = " ".join(str(error).split())
        raise SettingError(f"table={table}: cannot be read: {text}") from error
    if not found:
        raise SettingError(f"table={table}: no rows in it")
    if all(line.fault for line in found):
        first = found[0].fault
        remedy = "; --kind hf reads lists of captions" if " holds a list" in first else ""
        raise SettingError(
            f"table={table}: cannot be read: none of its {len(found)} rows can be used; the first: "
            f"{first}{remedy}"
        )
    return [_row(line.values, line.fault) for line in found]


def _row(values: tuple[str | None, ...], fault: str) -> Row:
    name, caption = (*values, None, None)[:2]
    return Row(name or "", caption or "", fault)


def _require(wanted: dict[str, str], there: list[str], table: str) -> None:
    for name, count in Counter(there).items():
        if count > 1:
            raise ValueError(f"two columns of the name {name!r}")
    for setting, column in wanted.items():
        if column not in there:
            raise SettingError(
                f"{setting}={column}: no such column in {table}{nearest(column, there)}; "
                f"there are: {', '.join(there)}"
            )

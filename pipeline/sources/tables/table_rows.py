"""Rows of the tables that people bring: csv, tsv, json, jsonl, txt and parquet.

No row is lost: each comes with its values, or with its place and what is the matter with it. What
a quote means is the format's to say:

- csv (RFC 4180): a field that begins with a quote ends with one, has two for one inside, and may
  have several lines. Where a quote does not fit, the line it opens on is malformed, and reading
  goes on with the next line: the quote does not swallow the rows behind it.
- tsv: a line is a row and a quote a letter like any other, unless the field is quoted as in a csv,
  as pandas and spreadsheets write it, and the row has as many fields as the header.
- txt: a line is a link.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.sources.tables.captions import bad_text, encoding_of

FORMATS = ("csv", "tsv", "json", "jsonl", "txt", "parquet")
BATCH = 10_000  # rows of a parquet in memory
_HEAD = 4096  # bytes that tell the encoding
_HEADER_LINES = 4  # beyond its first: a quote without an end does not swallow the table
_LOOKED_AT = 1000  # lines, for the columns of a jsonl
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not in the file's encoding


class Line(NamedTuple):
    """A row: values of the columns asked for in their order, or why it has none."""

    values: tuple[Any, ...]
    fault: str = ""  # "line 7: 3 fields, the header has 2"


class Columns(NamedTuple):
    """What is wanted of a table."""

    text: tuple[str, ...]  # columns whose values are taken as text; the first names the picture
    others: tuple[str, ...] = ()  # further ones, of whatever type they are
    encoding: str = "auto"
    #: Whether a value of the first column looks like one: tells a row from a line of a caption.
    looks_right: Callable[[str], Any] = re.compile(r"\s*\w+://\S+\s*").fullmatch

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.text, *self.others)


def columns(file: IO[bytes], format: str, encoding: str = "auto") -> list[str]:
    """The names of a table's columns. The file, at its start, is read and may be closed.

    Raises:
        ValueError: it is no table in this format.
    """
    if format == "txt":
        return ["url"]
    if format == "parquet":
        return pq.read_schema(file).names
    if format in ("csv", "tsv"):
        header = _header(_Lines(_opened(file, encoding)), _DELIMITERS[format])
        if any(_ESCAPED.search(name) or "\0" in name for name in header):
            raise ValueError("its header is no UTF-8; save it as UTF-8, or set encoding")
        return header
    if format == "jsonl":
        rows = list(islice(_json_lines(file, encoding), _LOOKED_AT))
        found = [row for row, _ in rows if row is not None]
        if rows and not found:
            raise ValueError(f"not a table in format jsonl: {rows[0][1]}")
    else:
        found = [row for row in _json_rows(file, encoding) if isinstance(row, dict)]
    return list(dict.fromkeys(name for row in found for name in row))


def lines(file: IO[bytes], format: str, wanted: Columns) -> Iterator[Line]:
    """Every row of a table, in its order; blank lines are none. The file is at its start.

    Raises:
        ValueError: the file is broken, so that nobody can tell its rows.
    """
    if format == "parquet":
        yield from _parquet(file, wanted)
        return
    for place, values, fault in _raw(file, format, wanted):
        yield Line((), f"{place}: {fault}") if fault else _plain(place, values, wanted)


def _raw(file: IO[bytes], format: str, wanted: Columns) -> Iterator[tuple[str, Sequence, str]]:
    """(place, values, fault) of each row of what is text."""
    if format in ("csv", "tsv"):
        yield from _delimited(_Lines(_opened(file, wanted.encoding)), format, wanted)
    elif format == "txt":
        for number, line in enumerate(_opened(file, wanted.encoding), 1):
            if line.strip("\r\n"):
                yield f"line {number}", [line.rstrip("\r\n")], ""
    elif format == "jsonl":
        for row, fault in _json_lines(file, wanted.encoding):
            values = () if row is None else [row.get(name) for name in wanted.names]
            place, _, fault = fault.partition(": ")
            yield place, values, fault
    else:
        for number, row in enumerate(_json_rows(file, wanted.encoding), 1):
            if isinstance(row, dict):
                yield f"row {number}", [row.get(name) for name in wanted.names], ""
            else:
                yield f"row {number}", (), "no JSON object"


def _plain(place: str, values: Sequence, wanted: Columns) -> Line:
    """A row whose text can be stored, or what is the matter with it."""
    texts = []
    for name, value in zip(wanted.text, values, strict=False):
        if type(value) is str and value.isascii():
            texts.append(value)
            continue
        if isinstance(value, list | dict):
            return Line((), f"{place}: {name} holds a {type(value).__name__}, needs text")
        if value is not None and not isinstance(value, str):
            value = None if value != value else json.dumps(value)  # no number: a gap, in pandas
        if value and (found := _ESCAPED.search(value)):
            byte = ord(found[0]) - 0xDC00
            why = bad_text("text in the file's encoding", wanted.encoding, byte, found.start())
            return Line((), f"{place}: {name}: {why}")
        # Halves of surrogate pairs, which JSON can hold, are in no encoding.
        texts.append(value and value.encode("utf-8", "replace").decode())
    return Line((*texts, *values[len(wanted.text) :]))


# csv and tsv.

_DELIMITERS = {"csv": ",", "tsv": "\t"}


def _opened(file: IO[bytes], stated: str) -> io.TextIOWrapper:
    name = encoding_of(file.read(_HEAD), stated)
    file.seek(0)
    name = "utf-8-sig" if name == "utf-8" else name
    return io.TextIOWrapper(file, name, "surrogateescape", newline="")


class _Lines:
    """A text's lines with their ends, of which those read last can be given back."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream
        self._back: list[str] = []
        self.number = 0  # of the line that came last

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._back.pop() if self._back else next(self._stream)
        self.number += 1
        return line

    def give_back(self, taken: list[str]) -> None:
        self._back += reversed(taken)
        self.number -= len(taken)


def _header(found: _Lines, delimiter: str) -> list[str]:
    """The first line with something in it; quoted names may have a few lines more.

    Raises:
        csv.Error: a quote in it does not fit.
    """
    first = next((line for line in found if line.strip("\r\n")), "")
    place, few = found.number, chain([first], islice(found, _HEADER_LINES))
    try:
        return next(csv.reader(few, delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise csv.Error(f"its header, line {place}: {error}") from error


def _delimited(
    found: _Lines, format: str, wanted: Columns
) -> Iterator[tuple[str, Sequence[str], str]]:
    delimiter = _DELIMITERS[format]
    header = _header(found, delimiter)
    places = [header.index(name) for name in wanted.names]

    def is_row(line: str) -> bool:
        fields = line.rstrip("\r\n").split(delimiter)
        if len(header) == 1 or len(fields) < 2:
            return False
        if format == "tsv":
            return len(fields) == len(header)
        return len(fields) > places[0] and bool(wanted.looks_right(fields[places[0]]))

    for line in found:
        plain = line.rstrip("\r\n")
        if not plain:
            continue
        place, fault = f"line {found.number}", ""
        fields = plain.split(delimiter)
        if '"' in line:
            quoted = _quoted(line, found, delimiter, len(header), is_row)
            if quoted is None and format == "csv":
                fault = (
                    "quotes that do not fit: a quoted field ends with a quote, and has two for one"
                )
            fields = quoted or fields
        if not fault and len(fields) != len(header):
            fault = f"{len(fields)} fields, the header has {len(header)}"
        yield place, () if fault else [fields[at] for at in places], fault


def _quoted(
    first: str, found: _Lines, delimiter: str, width: int, is_row: Callable[[str], bool]
) -> list[str] | None:
    """A row with quoted fields and the lines that belong to it; None where it is none, and then
    all but its first line are left."""
    taken: list[str] = []

    def following() -> Iterator[str]:
        yield first
        for line in found:
            taken.append(line)
            yield line

    try:
        row = next(csv.reader(following(), delimiter=delimiter, strict=True))
    except csv.Error:
        row = None
    if row is not None and len(row) != width and not taken and delimiter == ",":
        return row  # its quotes fit, its fields are too few or too many
    if row is None or len(row) != width or any(map(is_row, taken)):
        found.give_back(taken)
        return None
    return row


# json and jsonl.


def _json_lines(file: IO[bytes], encoding: str) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """(object, "line 7") of each line, or (None, "line 7: why not"). JSON allows within a string
    what splitlines() would split at."""
    stream = _opened(file, encoding)
    stream.reconfigure(newline="\n")
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield None, f"line {number}: no JSON: {getattr(error, 'msg', type(error).__name__)}"
            continue
        if isinstance(row, dict):
            yield row, f"line {number}"
        else:
            yield None, f"line {number}: a row is no JSON object"


def _json_rows(file: IO[bytes], encoding: str) -> list[Any]:
    """A list of objects, or columns of values as pandas writes them."""
    found = json.loads(_opened(file, encoding).read())
    if isinstance(found, dict):
        cells = list(found.values())
        if cells and all(isinstance(column, dict) for column in cells):
            index = dict.fromkeys(at for column in cells for at in column)
            return [{name: found[name].get(at) for name in found} for at in index]
        if cells and all(isinstance(column, list) for column in cells):
            return [dict(zip(found, row, strict=True)) for row in zip(*cells, strict=True)]
        return [found]
    if not isinstance(found, list) or (found and not any(isinstance(r, dict) for r in found)):
        raise ValueError("a row is no JSON object")
    return found


# parquet.


def _parquet(file: IO[bytes], wanted: Columns) -> Iterator[Line]:
    with pq.ParquetFile(file) as table:
        for name in wanted.text:
            kind = table.schema_arrow.field(name).type
            if pa.types.is_nested(kind):
                raise ValueError(f"column {name} holds {kind}, needs text")
        number = 0
        # Without Arrow's threads: see pipeline.core.tables.
        for batch in table.iter_batches(BATCH, columns=list(wanted.names), use_threads=False):
            texts = [text_values(batch.column(name)) for name in wanted.text]
            others = [batch.column(name).to_pylist() for name in wanted.others]
            for values in zip(*texts, *others, strict=True):
                number += 1
                named = zip(wanted.text, values, strict=False)
                bad = next((name for name, value in named if isinstance(value, bytes)), None)
                if bad is None:
                    yield Line(values)
                else:
                    yield Line((), f"row {number}: {bad}: no UTF-8")
        if number != table.metadata.num_rows:
            raise ValueError(f"{number} rows came, its footer says {table.metadata.num_rows}")


def text_values(column: pa.Array) -> list[Any]:
    """A column as strings; bytes that are no UTF-8 stay bytes."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind):
        column, kind = column.cast(pa.large_binary()), pa.large_binary()
    if not (is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        if pa.types.is_floating(kind):
            column = pc.if_else(pc.is_nan(column), None, column)  # pyright: ignore
        return column.cast(pa.string()).to_pylist()
    try:
        column = column.cast(pa.large_string() if pa.types.is_large_binary(kind) else pa.string())
        column.validate(full=True)
        return column.to_pylist()
    except pa.ArrowInvalid:
        return [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]


def python_values(column: pa.Array) -> list[Any]:
    """A column of any type as Python values, where to_pylist() breaks off at bytes in a string
    that are no UTF-8: those values are bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        pass
    if isinstance(column, pa.DictionaryArray):
        return python_values(column.dictionary_decode())
    if is_string(column.type):
        return text_values(column)
    if pa.types.is_struct(column.type):
        fields = {f.name: python_values(column.field(f.name)) for f in column.type}
        rows = [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]
        there = column.is_valid().to_pylist()
        return [row if valid else None for row, valid in zip(rows, there, strict=True)]
    return [
        python_values(cell.values) if cell.is_valid else None  # pyright: ignore
        for cell in column
    ]


def is_string(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value

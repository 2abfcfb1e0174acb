"""HOW a table of links is read: by img2dataset's own reader, a file at a time."""

from __future__ import annotations

import contextlib
import csv
import errno
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import SettingError, nearest
from pipeline.core.spool import SCRATCH_VARIABLE, scratch, scratch_folder
from pipeline.sources.tables.url_reader import reader_class

FORMATS = ("csv", "tsv", "json", "jsonl", "txt", "parquet")  # all but the last also as .gz
ENDINGS = (*(f"{name}.gz" for name in FORMATS[:-1]), *FORMATS)
_BROKEN = (
    *(pa.ArrowException, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error),
    csv.Error,
)
_QUOTED = re.compile(r"(Expected \d+ columns, got \d+): .*")
_LOOKED_AT = 1000  # lines, for the columns of a jsonl


@dataclass(frozen=True)
class UrlList:
    """Where a list is and how it is read; option names are img2dataset's."""

    url_list: str  # a file or a folder of files: a path, or any fsspec URL
    input_format: str  # "auto": by the ending
    url_col: str
    caption_col: str | None
    verify_hash: tuple[str, str] | None  # (column, kind)
    number_sample_per_shard: int
    more: tuple[str, ...] = ()  # further columns that `choose` looks at
    choose: Callable[[pa.Table], pa.Table] | None = None  # of a table, the rows that are wanted
    choice: Any = None  # plain values that say what `choose` does

    def identity(self) -> dict[str, Any]:
        """What decides the rows, without what is secret in a link."""
        return {
            "list": shown(self.url_list),
            "format": self.input_format,
            "columns": [self.url_col, self.caption_col, self.verify_hash, list(self.more)],
            "rows": self.number_sample_per_shard,
            "choice": self.choice,
        }


def shown(url: str) -> str:
    """A link or path without user, password and query, which may be secret."""
    if "://" not in url:
        return url
    found = urlsplit(url)
    return f"{found.scheme}://{found.netloc.rpartition('@')[2]}{found.path}"


def split(fs: Any, path: str, format: str, wanted: UrlList) -> Iterator[pa.Table]:
    """The rows of one file that are wanted, a shard's at a time."""
    size = wanted.number_sample_per_shard
    with scratch_folder("list") as folder:
        local = Path(path)
        if "file" not in fs.protocol:
            local = Path(folder, f"list.{format}")
            with readable(wanted):
                fs.get_file(path, str(local))
        waiting: list[pa.Table] = []
        rows = 0
        for table in _tables(local, format, wanted, folder):
            waiting.append(table)
            rows += table.num_rows
            if rows >= size:
                whole = pa.concat_tables(waiting)
                for start in range(0, rows - rows % size, size):
                    yield whole.slice(start, size)
                waiting, rows = [whole.slice(rows - rows % size)], rows % size
        if rows:
            yield pa.concat_tables(waiting)


def _tables(path: Path, format: str, wanted: UrlList, folder: str) -> Iterator[pa.Table]:
    """A file through img2dataset's reader, then the rows that are wanted."""
    digest = wanted.verify_hash
    if format.startswith("txt") and wanted.caption_col is not None:
        raise SettingError(
            f"caption_col={wanted.caption_col}: {shown(wanted.url_list)} is a plain list of links; "
            "set caption_col to nothing and let a captioner write captions"
        )
    with readable(wanted, format):
        _require_columns(path, format, wanted)  # the reader would try for over a minute
    with readable(wanted, format), contextlib.redirect_stdout(io.StringIO()):
        reader = reader_class(list(_columns_of(wanted).values()), wanted.more)(
            url_list=str(path),
            input_format=format,
            url_col=wanted.url_col,
            caption_col=wanted.caption_col,
            verify_hash_col=digest and digest[0],
            verify_hash_type=digest and digest[1],
            save_additional_columns=list(wanted.more) or None,
            number_sample_per_shard=wanted.number_sample_per_shard,
            done_shards=set(),
            tmp_path=folder,
        )
        pieces = list(reader)
    for _, feather in pieces:
        with pa.OSFile(feather) as file:
            table = pa.ipc.open_file(file).read_all()
        Path(feather).unlink()
        names = {"url": "url", "caption": "caption", "hash": digest[1] if digest else ""}
        made = pa.table(
            {to: _text(table, name, wanted) for to, name in names.items()}
            | {name: table[name] for name in wanted.more}
        )
        if wanted.choose is not None:
            with readable(wanted, format):  # a column that holds something else
                made = wanted.choose(made)
        yield made.select(list(names))


def _text(table: pa.Table, name: str, wanted: UrlList) -> pa.ChunkedArray | pa.Array:
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    column = table[name]
    if pa.types.is_nested(column.type):
        raise SettingError(
            f"url_list={shown(wanted.url_list)}: column {name} holds {column.type}, needs text"
        )
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        try:
            column = column.cast(pa.large_binary()).cast(pa.large_string())
        except pa.ArrowInvalid:  # a letter lost is better than no list
            texts = (
                value if value is None else value.decode("utf-8", "replace")
                for value in column.to_pylist()
            )
            column = pa.chunked_array([pa.array(texts, pa.string())])
    return column.cast(pa.string())


@contextlib.contextmanager
def readable(wanted: UrlList, format: str = "") -> Iterator[None]:
    """Turns what goes wrong with a list into a line about it; a link's query stays out of it."""
    name = f"url_list={shown(wanted.url_list)}"
    try:
        yield
    except SettingError:
        raise
    except FileNotFoundError:
        raise SettingError(f"{name}: no such file; give a path or an fsspec URL") from None
    except ImportError as error:
        raise SettingError(f"{name}: {str(error).splitlines()[0]}") from error
    except _BROKEN as error:
        # Without the row, which pyarrow quotes: its link may hold a signature.
        first = _QUOTED.sub(r"\1", str(error).splitlines()[0])
        raise SettingError(f"{name}: not a table in format {format}: {first}") from error
    except ValueError as error:
        if "://" in wanted.url_list and not format:
            raise SettingError(f"{name}: {type(error).__name__}") from None
        raise SettingError(f"{name}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise SettingError(
                f"{scratch()}: no space left to read {name}; free some, or set {SCRATCH_VARIABLE} "
                "to a folder on a larger disk"
            ) from None
        # A client's error quotes the link; its type and status say what is the matter.
        if isinstance(error, OSError) and error.strerror and "://" not in wanted.url_list:
            raise SettingError(f"{name}: {error.strerror}") from error
        if format:
            raise
        status = getattr(error, "status", None) or getattr(error, "code", None) or ""
        told = f"{type(error).__name__} {status}".strip()
        raise SettingError(f"{name}: cannot be read: {told}") from None


def _require_columns(path: Path, format: str, wanted: UrlList) -> None:
    """
    Raises:
        SettingError: which column is not there, and which are.
    """
    there = _columns(path, format)
    needed = _columns_of(wanted)
    if twice := [name for name, count in Counter(needed.values()).items() if count > 1]:
        settings = ", ".join(setting for setting, name in needed.items() if name in twice)
        raise SettingError(f"{settings}: all are column {twice[0]}; each needs one of its own")
    for setting, name in {**{name: name for name in wanted.more}, **needed}.items():
        if name not in there:
            raise SettingError(
                f"{setting}={name}: {shown(wanted.url_list)} has no such column"
                f"{nearest(name, there)}; there are: {', '.join(there)}"
            )
        if there.count(name) > 1:
            raise SettingError(f"{setting}={name}: {shown(wanted.url_list)} has two such columns")


def _columns_of(wanted: UrlList) -> dict[str, str]:
    """Setting -> the column that it names."""
    found = {
        "url_col": wanted.url_col,
        "caption_col": wanted.caption_col,
        "verify_hash": wanted.verify_hash and wanted.verify_hash[0],
    }
    return {setting: name for setting, name in found.items() if name}


def _opened(path: Path, format: str) -> IO[str]:
    opener = gzip.open if format.endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", errors="replace")  # pyright: ignore


def _columns(path: Path, format: str) -> list[str]:
    kind = format.removesuffix(".gz")
    if kind == "txt":
        return ["url"]
    if kind == "parquet":
        return pq.read_schema(path).names
    with _opened(path, format) as file:
        if kind in ("csv", "tsv"):
            header = next(csv.reader(file, delimiter="," if kind == "csv" else "\t"), [])
            if any(letter in name for name in header for letter in "\0\ufffd"):
                raise ValueError("its header is no UTF-8; save it as UTF-8")
            return header
        if kind == "jsonl":
            rows = [json.loads(line) for line in islice(file, _LOOKED_AT) if line.strip()]
        else:
            found = json.load(file)
            rows = found if isinstance(found, list) else [found]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"not a table in format {format}: a row is no JSON object")
    return list(dict.fromkeys(name for row in rows for name in row))

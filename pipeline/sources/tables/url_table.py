"""HOW a list of links is read: a file at a time, each row as what is wanted of it, or its fault."""

from __future__ import annotations

import contextlib
import csv
import errno
import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit

import pyarrow as pa

from pipeline.core.errors import SettingError, nearest
from pipeline.core.staged_file import SCRATCH_VARIABLE, scratch, scratch_folder
from pipeline.sources.tables.table_rows import BATCH, FORMATS, Columns, Line, columns, lines

#: All but parquet also as .gz.
ENDINGS = (*(f"{name}.gz" for name in FORMATS[:-1]), *FORMATS)
_BROKEN = (
    *(pa.ArrowException, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error),
    csv.Error,
)


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
    choose: Callable[[pa.Table], pa.Array] | None = None  # of a table's rows, which are wanted
    choice: Any = None  # plain values that say what `choose` does
    encoding: str = "auto"  # of what is text

    def identity(self) -> dict[str, Any]:
        """What decides the rows, without what is secret in a link."""
        return {
            "list": shown(self.url_list),
            "format": self.input_format,
            "columns": [self.url_col, self.caption_col, self.verify_hash, list(self.more)],
            "rows": self.number_sample_per_shard,
            "choice": self.choice,
            **({} if self.encoding == "auto" else {"encoding": self.encoding}),
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
    with contextlib.ExitStack() as stack:
        local = Path(path)
        if "file" not in fs.protocol:
            with readable(wanted):
                local = Path(stack.enter_context(scratch_folder("list")), f"list.{format}")
                fs.get_file(path, str(local))
        waiting: list[pa.Table] = []
        rows = 0
        for table in _tables(local, format, wanted):
            waiting.append(table)
            rows += table.num_rows
            if rows >= size:
                whole = pa.concat_tables(waiting)
                for start in range(0, rows - rows % size, size):
                    yield whole.slice(start, size)
                waiting, rows = [whole.slice(rows - rows % size)], rows % size
        if rows:
            yield pa.concat_tables(waiting)


def _tables(path: Path, format: str, wanted: UrlList) -> Iterator[pa.Table]:
    """The rows of a file that are wanted, and those that are none, some thousands at a time."""
    if format.startswith("txt") and wanted.caption_col is not None:
        raise SettingError(
            f"caption_col={wanted.caption_col}: {shown(wanted.url_list)} is a plain list of links; "
            "set caption_col to nothing and let a captioner write captions"
        )
    kind, names = format.removesuffix(".gz"), _columns_of(wanted)
    asked = Columns(tuple(names.values()), wanted.more, wanted.encoding)
    with readable(wanted, format):
        with _opened(path, format) as file:
            _require_columns(columns(file, kind, wanted.encoding), wanted)
        with _opened(path, format) as file:
            rows = lines(file, kind, asked)
            while some := list(islice(rows, BATCH)):
                yield _table(some, list(names), wanted)


def _table(rows: list[Line], settings: list[str], wanted: UrlList) -> pa.Table:
    """url, caption, hash and fault of rows; of those without a fault, the wanted ones."""
    width = len(settings) + len(wanted.more)
    cells = list(zip(*(row.values or (None,) * width for row in rows), strict=True))
    texts = dict(zip(settings, cells, strict=False))
    names = {"url": "url_col", "caption": "caption_col", "hash": "verify_hash"}
    nothing = (None,) * len(rows)
    found = {to: pa.array(texts.get(name, nothing), pa.string()) for to, name in names.items()}
    found["fault"] = pa.array([row.fault or None for row in rows], pa.string())
    table = pa.table(found)
    if wanted.choose is None:
        return table
    more = dict(zip(wanted.more, cells[len(settings) :], strict=True))
    keep = wanted.choose(pa.table({**found, **more})).to_pylist()
    kept = [bool(row.fault or good) for row, good in zip(rows, keep, strict=True)]
    return table.filter(pa.array(kept))


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
        first = (str(error) or type(error).__name__).splitlines()[0]
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


def _require_columns(there: list[str], wanted: UrlList) -> None:
    """
    Raises:
        SettingError: which column is not there, and which are.
    """
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


def _opened(path: Path, format: str) -> IO[bytes]:
    return cast(IO[bytes], (gzip.open if format.endswith(".gz") else open)(path, "rb"))

"""A table of links, split once into the rows of each shard.

A list of 37 million rows takes minutes to read. So the process that plans reads it once, by
img2dataset's own reader, and keeps each shard's rows as a small parquet under the root, named by
its content: planning again compares versions of files only, a worker reads its own shard's rows,
and rows that are appended to the last file leave the shards before them as they are.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from pipeline.core.errors import BrokenShard, SettingError, nearest
from pipeline.core.spool import scratch
from pipeline.core.store import Store, canonical_json, fingerprint, sha256
from pipeline.core.tables import from_parquet, to_parquet

SCHEMA = 1
FORMATS = ("csv", "tsv", "json", "jsonl", "txt", "parquet")  # all but the last also as .gz
ENDINGS = (*(f"{name}.gz" for name in FORMATS[:-1]), *FORMATS)
_VERSIONS = ("ETag", "etag", "Content-MD5", "Last-Modified", "LastModified", "mtime", "md5Hash")
_SILENT = ("blob_id", "oid", "last_commit", "lfs")  # the hub's


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


@dataclass(frozen=True)
class Row:
    """One line of a list; None where it says nothing."""

    url: str | None
    caption: str | None
    hash: str | None


def parts(store: Store, folder: str, wanted: UrlList) -> list[tuple[str, int]]:
    """The shards of a list: (name of its rows in `folder`, how many). Reads what has changed.

    Raises:
        SettingError: the list cannot be read, or a column is not there.
    """
    record = f"{folder}/{fingerprint(wanted.identity())}.json"
    try:
        kept = store.read_json(record)
    except FileNotFoundError:
        kept = {"schema": SCHEMA, "files": []}
    if kept["schema"] > SCHEMA:
        raise SettingError(
            f"{store.url(record)}: schema {kept['schema']}, this version reads up to {SCHEMA}; "
            "upgrade the package"
        )
    known = {(file["name"], file["version"]): file["parts"] for file in kept["files"]}
    with _readable(wanted):
        import fsspec

        fs, path = fsspec.core.url_to_fs(wanted.url_list)
        found = _files(fs, path, wanted)
    files = []
    for path, format, version in found:
        made = known.get((shown(path), version)) if version else None
        if made is None:
            made = [
                [_place(store, folder, rows), rows.num_rows]
                for rows in _split(fs, path, format, wanted)
            ]
        files.append({"name": shown(path), "version": version, "parts": made})
    if files != kept["files"]:
        store.write_json(record, {"schema": SCHEMA, "files": files})
    return [(name, rows) for file in files for name, rows in file["parts"]]


def read(store: Store, folder: str, name: str) -> Iterator[Row]:
    """A shard's rows.

    Raises:
        BrokenShard: they are gone, or others.
    """
    path = f"{folder}/{name}.parquet"
    try:
        table = from_parquet(store.read(path))
    except FileNotFoundError:
        raise BrokenShard(f"{store.url(path)} is gone; run again, which reads the list") from None
    except pa.ArrowInvalid as error:
        raise BrokenShard(f"{store.url(path)} cannot be read; delete it and run again") from error
    if _name(table) != name:
        raise BrokenShard(f"{store.url(path)} holds other rows; delete it and run again")
    columns = table.to_pydict()
    for url, caption, digest in zip(
        columns["url"], columns["caption"], columns["hash"], strict=True
    ):
        yield Row(url, caption, digest)


def shown(url: str) -> str:
    """A link or path without user, password and query, which may be secret."""
    if "://" not in url:
        return url
    found = urlsplit(url)
    return f"{found.scheme}://{found.netloc.rpartition('@')[2]}{found.path}"


def _files(fs: Any, path: str, wanted: UrlList) -> list[tuple[str, str, str]]:
    """(path, format, version) of each file of the list, in order of name."""
    # An HTTP client takes any page with links for a folder.
    is_folder = not _is_http(fs) and fs.isdir(path)
    if not is_folder:
        names = [path]
    else:
        endings = ENDINGS if wanted.input_format == "auto" else (wanted.input_format,)
        names = sorted(n for n in fs.ls(path, detail=False) if _format(n) in endings)
        formats = {_format(name) for name in names}
        if len(formats) != 1:
            raise SettingError(
                f"url_list={shown(wanted.url_list)}: the folder holds "
                + (f"lists in {len(formats)} formats; say which: " if formats else "no list, ")
                + ("input_format=" if formats else "no file named *.")
                + "|".join(sorted(str(f) for f in formats) or endings)
            )
    return [
        (name, _format(name) or "" if is_folder else _chosen(name, wanted), _version(fs, name))
        for name in names
    ]


def _chosen(name: str, wanted: UrlList) -> str:
    if wanted.input_format != "auto":
        return wanted.input_format
    format = _format(name)
    if format is None:
        raise SettingError(
            f"url_list={shown(wanted.url_list)}: the name does not tell its format; set "
            f"input_format, one of {', '.join(ENDINGS)}"
        )
    return format


def _format(name: str) -> str | None:
    path = urlsplit(name).path if "://" in name else name
    return next((ending for ending in ENDINGS if path.lower().endswith(f".{ending}")), None)


def _version(fs: Any, path: str) -> str:
    """Changes when the file does; "" where the server does not tell, so it is read anew."""
    info = fs.info(path)
    told = {key: str(info[key]) for key in (*_VERSIONS, *_SILENT) if info.get(key)}
    return fingerprint({"size": info.get("size"), **told}) if told else ""


def _is_http(fs: Any) -> bool:
    protocols = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    return "http" in protocols


def _split(fs: Any, path: str, format: str, wanted: UrlList) -> Iterator[pa.Table]:
    """The rows of one file that are wanted, a shard's at a time."""
    size = wanted.number_sample_per_shard
    with tempfile.TemporaryDirectory(prefix="list-", dir=scratch()) as folder:
        local = Path(path)
        if "file" not in fs.protocol:
            local = Path(folder, f"list.{format}")
            with _readable(wanted):
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
    with _readable(wanted, path, format), contextlib.redirect_stdout(io.StringIO()):
        reader = _reader_class()(
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
        made = list(reader)
    for _, feather in made:
        with pa.OSFile(feather) as file:
            table = pa.ipc.open_file(file).read_all()
        Path(feather).unlink()
        if wanted.choose is not None:
            table = wanted.choose(table)
        names = {"url": "url", "caption": "caption", "hash": digest[1] if digest else ""}
        yield pa.table({to: _text(table, name, wanted) for to, name in names.items()})


def _text(table: pa.Table, name: str, wanted: UrlList) -> pa.ChunkedArray | pa.Array:
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    column = table[name]
    if pa.types.is_nested(column.type):
        raise SettingError(
            f"url_list={shown(wanted.url_list)}: column {name} holds {column.type}, needs text"
        )
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        column = column.cast(pa.large_binary()).cast(pa.large_string())
    return column.cast(pa.string())


@functools.cache
def _reader_class() -> Any:
    """img2dataset's reader, from its file: the package imports albumentations, which takes six
    seconds and asks the internet for a newer version of itself."""
    import importlib.util

    package = importlib.util.find_spec("img2dataset")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "reader.py")
    spec = importlib.util.spec_from_file_location("_img2dataset_reader", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Reader


@contextlib.contextmanager
def _readable(wanted: UrlList, path: Path | None = None, format: str = "") -> Iterator[None]:
    """Turns what goes wrong with a list into a line about it; a link's query stays out of it."""
    name = f"url_list={shown(wanted.url_list)}"
    try:
        yield
    except SettingError:
        raise
    except KeyError as error:
        raise SettingError(_missing(path, format, wanted) or f"{name}: {error}") from error
    except FileNotFoundError:
        raise SettingError(f"{name}: no such file; give a path or an fsspec URL") from None
    except ImportError as error:
        raise SettingError(f"{name}: {str(error).splitlines()[0]}") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise SettingError(f"{name}: not a table in format {format}: {first}") from error
    except ValueError as error:
        if "://" in wanted.url_list and path is None:
            raise SettingError(f"{name}: {type(error).__name__}") from None
        raise SettingError(f"{name}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        # A client's error quotes the link; its type and status say what is the matter.
        if isinstance(error, OSError) and error.strerror and "://" not in wanted.url_list:
            raise SettingError(f"{name}: {error.strerror}") from error
        if path is not None:
            raise
        status = getattr(error, "status", None) or getattr(error, "code", None) or ""
        told = f"{type(error).__name__} {status}".strip()
        raise SettingError(f"{name}: cannot be read: {told}") from None


def _missing(path: Path | None, format: str, wanted: UrlList) -> str | None:
    """Which column is not there, and which are."""
    if path is None:
        return None
    there = _columns(path, format)
    needed = {"url_col": wanted.url_col}
    if wanted.caption_col is not None:
        needed["caption_col"] = wanted.caption_col
    if wanted.verify_hash is not None:
        needed["verify_hash"] = wanted.verify_hash[0]
    needed.update({name: name for name in wanted.more})
    for setting, name in needed.items():
        if name not in there:
            hint = nearest(name, there)
            return (
                f"{setting}={name}: {shown(wanted.url_list)} has no such column{hint}; "
                f"there are: {', '.join(there)}"
            )
        if there.count(name) > 1:
            return f"{setting}={name}: {shown(wanted.url_list)} has two such columns"
    return None


def _columns(path: Path, format: str) -> list[str]:
    import gzip

    import pyarrow.parquet as pq

    if format == "parquet":
        return pq.read_schema(path).names
    with gzip.open(path, "rt") if format.endswith(".gz") else open(path) as file:
        kind = format.removesuffix(".gz")
        if kind in ("csv", "tsv"):
            import csv

            return next(csv.reader(file, delimiter="," if kind == "csv" else "\t"), [])
        rows = [json.loads(file.readline())] if kind == "jsonl" else json.load(file)
    return list(rows[0] if isinstance(rows, list) and rows else rows)


def _name(rows: pa.Table) -> str:
    """Over the values, not the file: another version of pyarrow writes other bytes."""
    columns = rows.to_pydict()
    return sha256(canonical_json([columns["url"], columns["caption"], columns["hash"]]))[:16]


def _place(store: Store, folder: str, rows: pa.Table) -> str:
    name = _name(rows)
    path = f"{folder}/{name}.parquet"
    if not store.exists(path):
        store.write(path, to_parquet(rows.combine_chunks()))
    return name

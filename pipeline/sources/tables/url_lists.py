"""A table of links, split once into the rows of each shard.

A list of 37 million rows takes minutes to read. So the process that plans reads it once and keeps
each shard's rows as a small parquet under the root, named by its content: planning again compares
versions of files only, a worker reads its own shard's rows, and rows that are appended to the last
file leave the shards before them as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from pipeline.core import layout, remote
from pipeline.core.drops import hash_of, read_links
from pipeline.core.errors import BrokenShard, SettingError
from pipeline.core.samples import sample_key
from pipeline.core.store import Store, canonical_json, fingerprint, sha256
from pipeline.core.tables import from_parquet, to_parquet
from pipeline.core.urls import canonical_links
from pipeline.sources.tables.url_table import ENDINGS, UrlList, readable, shown, split

SCHEMA = 1
_CONTENT = b"microdit.content"  # in a file whose rows were blanked: the name of what is left
#: Of what reads csv, tsv and txt. What an older one has read is read again, once: it took a stray
#: quote for the beginning of a field and lost the rows behind it.
READER = 2
_UNCHANGED = ("json", "parq")
# What tells a file's version, in the words of the file systems.
_VERSIONS = (
    *("ETag", "etag", "Content-MD5", "Last-Modified", "LastModified", "md5Hash", "mtime"),
    *("created", "blob_id", "oid", "last_commit", "lfs"),
)


@dataclass(frozen=True)
class Row:
    """One line of a list; None where it says nothing."""

    url: str | None
    caption: str | None
    hash: str | None
    fault: str = ""  # why it is none: "line 7: …"


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
    there = set(store.names(folder))
    known = {
        (file["name"], file["version"]): file["parts"]
        for file in kept["files"]
        if all(f"{name}.parquet" in there for name, _ in file["parts"])
        and (file.get("reader") == READER or (_format(file["name"]) or "")[:4] in _UNCHANGED)
    }
    with readable(wanted):
        import fsspec

        fs, path = fsspec.core.url_to_fs(wanted.url_list)
        found = _files(fs, path, wanted)
    files = []
    for number, (path, format, version) in enumerate(found, 1):
        made = known.get((shown(path), version)) if version else None
        if made is None:
            print(f"reading list {number} of {len(found)}: {shown(path)}", file=sys.stderr)
            made = _made(store, folder, shown(path), split(fs, path, format, wanted))
        files.append({"name": shown(path), "version": version, "reader": READER, "parts": made})
        if files != kept["files"][:number]:  # after each, so that an interrupted run goes on there
            store.write_json(record, {"schema": SCHEMA, "files": files})
    return [(name, rows) for file in files for name, rows in file["parts"]]


def _made(store: Store, folder: str, name: str, found: Iterator[pa.Table]) -> list[list[Any]]:
    """Keeps a file's rows, a shard's at a time; says how many are none.

    Raises:
        SettingError: all are: it is in another format, or in another encoding.
    """
    parts, faults = [], []
    for rows in found:
        faults += [fault for fault in rows["fault"].to_pylist() if fault]
        parts.append([_place(store, folder, rows), rows.num_rows])
    total = sum(rows for _, rows in parts)
    if faults:
        first = f"the first: {faults[0]}"
        if len(faults) == total:
            raise SettingError(f"{name}: none of its {total} rows can be used; {first}")
        told = f"{name}: {len(faults)} of {total} rows are malformed and become rejects; {first}"
        print(told, file=sys.stderr)
    return parts


def read(store: Store, folder: str, name: str) -> Iterator[Row]:
    """A shard's rows; empty where a link was taken down since the list was read, as `blank` will
    leave them.

    Raises:
        BrokenShard: they are gone, or others.
    """
    path = f"{folder}/{name}.parquet"
    try:
        table = from_parquet(store.read(path))
    except FileNotFoundError:
        raise BrokenShard(
            f"{store.url(path)} is gone; run again: that reads the list anew"
        ) from None
    except pa.ArrowInvalid as error:
        raise BrokenShard(f"{store.url(path)} cannot be read; delete it and run again") from error
    if _name(table) != _content(table, name):
        raise BrokenShard(f"{store.url(path)} holds other rows; delete it and run again")
    gone = set(_rows_of(table, read_links(store, folder.rpartition("/")[0])))
    for number, row in enumerate(table.to_pylist()):
        if number in gone:
            yield Row(None, None, None)
        else:
            yield Row(row["url"], row["caption"], row["hash"], row.get("fault") or "")


def rows_to_blank(
    store: Store, path: str, keys: dict[str, frozenset[str]], links: frozenset[str]
) -> list[int]:
    """Rows of a file of a list that were taken down and are there yet.

    Args:
        keys: shard that was made of these rows -> its dropped keys.
        links: hashes of links.
    """
    table = from_parquet(store.read(path))
    gone = set(_rows_of(table, links))
    for shard, dropped in keys.items():
        gone |= {n for n in range(table.num_rows) if sample_key(shard, n) in dropped}
    urls = table["url"].to_pylist()
    return sorted(n for n in gone if urls[n] is not None)


def find_links(store: Store, source: str, links: Collection[str]) -> set[str]:
    """Those of the hashes whose links stand in a source's lists."""
    folder, left = layout.lists_folder(source), set(links)
    for name in store.names(folder) if left else ():
        if name.endswith(".parquet"):
            forms = canonical_links(from_parquet(store.read(f"{folder}/{name}"))["url"])
            left -= {hash_of(form) for form in forms.to_pylist() if form is not None}
    return set(links) - left


def blank(store: Store, path: str, rows: Collection[int]) -> None:
    """Empties rows of a file. It keeps its name, so no shard that was made of it is stale, and
    other rows keep their numbers, which are their keys."""
    store.write(path, to_parquet(_blanked(from_parquet(store.read(path)), rows)))


def _rows_of(table: pa.Table, links: frozenset[str]) -> list[int]:
    if not links:
        return []
    forms = canonical_links(table["url"]).to_pylist()
    return [n for n, form in enumerate(forms) if form is not None and hash_of(form) in links]


def _blanked(table: pa.Table, rows: Collection[int]) -> pa.Table:
    gone = set(rows)
    columns = {
        field.name: pa.array(
            [None if n in gone else v for n, v in enumerate(table[field.name].to_pylist())],
            field.type,
        )
        for field in table.schema
    }
    found = pa.table(columns)
    return found.replace_schema_metadata({_CONTENT: _name(found)})


def _content(table: pa.Table, name: str) -> str:
    """What its values are to give: its name, but where rows were taken down since."""
    return (table.schema.metadata or {}).get(_CONTENT, name.encode()).decode()


def _files(fs: Any, path: str, wanted: UrlList) -> list[tuple[str, str, str]]:
    """(path, format, version) of each file of the list, in order of name."""
    name = f"url_list={shown(wanted.url_list)}"
    # An HTTP client takes any page with links for a folder.
    if _is_http(fs) or not fs.isdir(path):
        info = fs.info(path)
        format = _format(path) if wanted.input_format == "auto" else wanted.input_format
        if format is None:
            raise SettingError(
                f"{name}: its name does not tell the format; set input_format, one of "
                + ", ".join(ENDINGS)
            )
        return [(path, format, _version(info))]
    # Not its folders, whatever their names: Spark calls one x.parquet.
    entries = {e["name"]: e for e in fs.ls(path, detail=True) if remote.is_file(e)}
    endings = ENDINGS if wanted.input_format == "auto" else (wanted.input_format,)
    formats = {found: format for found in entries if (format := _format(found) or "") in endings}
    if not formats:
        raise SettingError(f"{name}: the folder holds no file named *.{'|'.join(endings)}")
    if len(kinds := sorted(set(formats.values()))) > 1:
        raise SettingError(
            f"{name}: the folder holds lists in {len(kinds)} formats; say which: "
            f"input_format={'|'.join(kinds)}"
        )
    return [(found, formats[found], _version(entries[found])) for found in sorted(formats)]


def _format(name: str) -> str | None:
    path = urlsplit(name).path if "://" in name else name
    return next((ending for ending in ENDINGS if path.lower().endswith(f".{ending}")), None)


def _version(info: dict[str, Any]) -> str:
    """Changes when the file does; "" where the server does not tell, so it is read anew."""
    told = {key: str(info[key]) for key in _VERSIONS if info.get(key)}
    return fingerprint({"size": info.get("size"), **told}) if told else ""


def _is_http(fs: Any) -> bool:
    protocols = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    return "http" in protocols


def _name(rows: pa.Table) -> str:
    """Over the values, not the file: another version of pyarrow writes other bytes."""
    columns = rows.to_pydict()
    names = ("url", "caption", "hash", "fault")
    return sha256(canonical_json([columns[name] for name in names if name in columns]))[:16]


def _place(store: Store, folder: str, rows: pa.Table) -> str:
    if rows["fault"].null_count == rows.num_rows:  # its name is then what it always was
        rows = rows.drop_columns(["fault"])
    name = _name(rows)
    path = f"{folder}/{name}.parquet"
    if not store.exists(path):
        rows = rows.combine_chunks()
        # A list that is read anew brings links back that were taken down.
        gone = _rows_of(rows, read_links(store, folder.rpartition("/")[0]))
        store.write(path, to_parquet(_blanked(rows, gone) if gone else rows))
    return name

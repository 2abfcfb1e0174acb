"""Your own pictures: a folder, local or any fsspec URL, with a text file beside each picture or one
table that names pictures and captions.

Order: without a table, names sorted; with one, its rows. So a picture whose name sorts last, or a
row appended to the table, changes the last shard and no other. A shard's spec holds a digest over
names, sizes, dates (on an object store: ETags) and the table's captions: what is edited in place
makes its shard stale.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from pipeline.core.errors import SettingError, StorageError
from pipeline.core.images import BadPicture
from pipeline.core.rules import Rules, readable
from pipeline.core.samples import FAILED, ImageRef, InputShard, RawImage, Reject, sample_key
from pipeline.core.store import Store, fingerprint
from pipeline.sources.tables.captions import caption_text
from pipeline.sources.tables.picture_table import ENDINGS, Row, read_rows

#: What counts as a picture in a folder. Not all can be decoded: those are rejected, not skipped.
PICTURES = (
    *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "avif", "gif", "bmp", "dib"),
    *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "jxl", "heic", "heif", "ico"),
    *("svg", "pdf", "eps", "ps", "psd", "tga"),
)
_AT_ONCE = 16  # files that are requested together from an object store


class Listed(NamedTuple):
    """A file as the folder's listing shows it."""

    bytes: int
    version: str  # changes when the file is replaced


class Folder(BaseModel):
    """Settings of the source."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rules: ClassVar[Rules] = Rules()

    folder: str  # a path, or s3://, gs://, any fsspec URL; sub-folders are searched too
    #: A csv, tsv, jsonl or parquet file in the folder that names the pictures; "": all there are.
    table: str = ""
    image_col: str = "file_name"  # of the table; names are relative to the folder
    caption_col: str = "text"  # of the table
    #: "own": from the table, or a text file beside each picture; "none": a captioner writes them.
    captions: Literal["own", "none"] = "own"
    caption_extension: Annotated[str, Field(pattern=r"^\.\w+$")] = (
        ".txt"  # of texts beside pictures
    )
    split: str = "train"  # any other is not trained on
    samples_per_shard: Annotated[int, Field(ge=1, le=10_000)] = 1000  # pictures a shard
    max_file_bytes: Annotated[int, Field(ge=1)] = 100_000_000  # larger files are not read

    def shards(self) -> list[InputShard]:
        """Lists the folder and reads the table; opens no picture.

        Raises:
            SettingError: no folder, no pictures, no captions, or a table that cannot be read.
            StorageError: the folder's store cannot be listed.
        """
        files = self._listing()
        rows = self._table_rows() if self.table else self._pictures(files)
        shards = []
        for first in range(0, len(rows), self.samples_per_shard):
            some = rows[first : first + self.samples_per_shard]
            entries = tuple((row.name, _listed(files, row.name).bytes) for row in some)
            spec = (self._versions(files, some), _digest(some), first, entries)
            shards.append(InputShard(f"{len(shards):05d}", self.split, spec))
        return shards

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        """The shard's pictures in order; those without a caption are rejects, and not read.

        Raises:
            RuntimeError: the table has changed since the shard was planned.
        """
        _, digest, first, entries = shard.spec
        rows = [Row(name, "") for name, _ in entries]
        if self.table:
            rows = self._table_rows()[first : first + len(entries)]
            if _digest(rows) != digest:
                raise RuntimeError(f"{self.table} has changed since this run began; run it again")
        files = (
            _File(key, row, size)
            for index, (row, (_, size)) in enumerate(zip(rows, entries, strict=True))
            for key in [sample_key(shard.id, index)]
            if only is None or key in only
        )
        at_once = 1 if self._store().local else _AT_ONCE
        while some := list(islice(files, at_once)):
            texts = self._captions([file.row for file in some])
            found = self._read_pictures(some, texts)
            for file, text, data in zip(some, texts, found, strict=True):
                if isinstance(text, str) and isinstance(data, bytes):
                    yield RawImage(ImageRef(file.key, file.row.name, text), data)
                else:
                    problem = text if isinstance(text, BadPicture) else data
                    assert isinstance(problem, BadPicture)
                    yield Reject(file.key, "download", problem.reason, str(problem))

    def decisive(self) -> dict[str, Any]:
        """A shard's spec says the rest: where the folder lies decides nothing."""
        return {"captions": self.captions, "max_file_bytes": self.max_file_bytes}

    def estimate(self, shard: InputShard) -> int:
        # A tar member pads to 512 twice, and each picture has a text and a JSON beside it.
        return sum(max(size, 0) + 3072 for _, size in shard.spec[3])

    def samples(self, shard: InputShard) -> int:
        return len(shard.spec[3])

    # Enumeration.

    def _store(self) -> Store:
        return Store(os.path.expanduser(self.folder))

    def _listing(self) -> dict[str, Listed]:
        """Name -> file, hidden ones left out."""
        store = self._store()
        if store.local:
            if not os.path.isdir(store.root):
                raise SettingError(f"folder={self.folder}: no such folder")
            found = _local_listing(store.root)
        else:
            found = {e.path: Listed(e.bytes, e.version) for e in store.walk("")}
        return {n: f for n, f in found.items() if not any(p[:1] == "." for p in n.split("/"))}

    def _pictures(self, files: dict[str, Listed]) -> list[Row]:
        names = sorted(n for n in files if n.rpartition(".")[2].lower() in PICTURES)
        if not names:
            raise SettingError(f"folder={self.folder}: no pictures in it")
        if self.captions == "own" and not any(self._sidecar(n) in files for n in names):
            tables = [n for n in sorted(files) if n.endswith(ENDINGS)]
            remedy = f"table: {tables[0]}" if tables else "table, or caption_extension"
            raise SettingError(
                f"captions=own: no picture in {self.folder} has a {self.caption_extension} file "
                f"beside it; set {remedy}, or captions: none to let a captioner write them"
            )
        return [Row(name, "") for name in names]

    def _table_rows(self) -> list[Row]:
        try:
            data = self._store().read(self.table)
        except FileNotFoundError as error:
            raise SettingError(f"table={self.table}: no such file in {self.folder}") from error
        caption_col = self.caption_col if self.captions == "own" else None
        return read_rows(data, self.table, self.image_col, caption_col)

    def _sidecar(self, name: str) -> str:
        return posixpath.splitext(name)[0] + self.caption_extension

    def _versions(self, files: dict[str, Listed], rows: list[Row]) -> str:
        """A digest that changes when a picture, or the text beside it, is replaced."""
        names = [row.name for row in rows]
        if self.captions == "own" and not self.table:
            names += [self._sidecar(name) for name in names]
        return fingerprint([_listed(files, name) for name in names])

    # Fetching.

    def _captions(self, rows: list[Row]) -> list[str | BadPicture]:
        if self.captions == "none":
            return [""] * len(rows)
        if self.table:
            return [_given(row.caption, f"{self.table}: no {self.caption_col}") for row in rows]
        paths = [self._sidecar(row.name) for row in rows]
        return [
            BadPicture("no-caption", f"{path}: {data}")
            if isinstance(data, BadPicture)
            else _given(caption_text(data), f"{path}: empty")
            for path, data in zip(paths, self._read(paths), strict=True)
        ]

    def _read_pictures(
        self, files: list[_File], texts: list[str | BadPicture]
    ) -> list[bytes | BadPicture]:
        """The files' bytes; those without a caption are not read."""
        verdicts: dict[int, bytes | BadPicture] = {}
        for at, (file, text) in enumerate(zip(files, texts, strict=True)):
            if isinstance(text, BadPicture):
                verdicts[at] = text
            elif not file.row.name:
                verdicts[at] = BadPicture(FAILED, f"{self.table}: the row names no file")
            elif _inside(file.row.name) is None:
                verdicts[at] = BadPicture("refused", f"{file.row.name}: no name in the folder")
            elif file.bytes > self.max_file_bytes:
                verdicts[at] = _too_large(file.bytes, self.max_file_bytes)
        left = [at for at in range(len(files)) if at not in verdicts]
        found = self._read([_inside(files[at].row.name) or "" for at in left])
        verdicts.update(zip(left, found, strict=True))
        return [verdicts[at] for at in range(len(files))]

    def _read(self, names: list[str]) -> list[bytes | BadPicture]:
        store = self._store()
        if store.local:
            return [_read_below(store.root, name, self.max_file_bytes) for name in names]
        missing = BadPicture(FAILED, "no such file")
        return [missing if data is None else data for data in store.read_many(names)]


class _File(NamedTuple):
    key: str
    row: Row
    bytes: int  # -1: the listing did not show it


def _digest(rows: list[Row]) -> str:
    return fingerprint(rows)


def _local_listing(root: str) -> dict[str, Listed]:
    found = {}
    for folder, _, names in os.walk(root, onerror=_unlisted):
        for name in names:
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
                listed = Listed(status.st_size, f"{status.st_size}-{int(status.st_mtime)}")
            except OSError:  # a link to nowhere: its fetch says so
                listed = Listed(-1, "")
            found[_printable(os.path.relpath(path, root))] = listed
    return found


def _unlisted(error: OSError) -> None:
    raise StorageError(f"{error.filename}: {error.strerror}; make it readable, or move it away")


def _listed(files: dict[str, Listed], name: str) -> Listed:
    return files.get(_inside(name) or "", Listed(-1, ""))


def _inside(name: str) -> str | None:
    """The name, normalised; None where it leads out of the folder or is a URL."""
    if not name or "\0" in name or "\\" in name or "://" in name or name.startswith("/"):
        return None
    name = posixpath.normpath(name)
    return None if name == ".." or name.startswith("../") else name


def _read_below(root: str, name: str, limit: int) -> bytes | BadPicture:
    """A regular file below a local folder; links are followed as long as they stay below it."""
    try:
        path = os.path.realpath(os.path.join(root, name))
        if not Path(path).is_relative_to(os.path.realpath(root)):
            return BadPicture("refused", "a link that leads out of the folder")
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would wait for its writer for ever
            return BadPicture("refused", "not a regular file")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
        return data if len(data) <= limit else _too_large(os.path.getsize(path), limit)
    except FileNotFoundError:
        return BadPicture(FAILED, "no such file")
    except OSError as error:
        return BadPicture(FAILED, error.strerror or type(error).__name__)


def _too_large(size: int, limit: int) -> BadPicture:
    return BadPicture("too-large", f"{size} bytes, max_file_bytes is {limit}")


def _given(caption: str, otherwise: str) -> str | BadPicture:
    """The caption, or why there is none."""
    return caption if readable(caption) else BadPicture("no-caption", otherwise)


def _printable(name: str) -> str:
    """A file name may hold bytes that are no UTF-8, which nothing could store: with them written
    as \\xNN it is the name of no file, and is refused by it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

"""Your own pictures: a folder, local or any fsspec URL, with a text file beside each picture or one
table that names pictures and captions.

Order: without a table, names sorted; with one, its rows. So a picture whose name sorts last, or a
row appended to the table, changes the last shard and no other. A shard's spec holds a digest over
names, sizes, dates (on an object store: ETags) and the table's captions: what is edited in place
makes its shard stale. How many pictures a shard takes is settled when the folder is first planned.
"""

from __future__ import annotations

import os
import posixpath
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from pipeline.core import layout
from pipeline.core.errors import SettingError, StorageError
from pipeline.core.images import BadPicture
from pipeline.core.location import Location
from pipeline.core.rules import Rules, readable
from pipeline.core.samples import FAILED, ImageRef, InputShard, RawImage, Reject, sample_key
from pipeline.core.store import Store, fingerprint
from pipeline.sources.holdout import SPLIT, Share, is_held_out
from pipeline.sources.tables.captions import BadText, Encoding, caption_text
from pipeline.sources.tables.picture_table import ENDINGS, Row, read_rows

#: What counts as a picture in a folder. Not all can be decoded: those are rejected, not skipped.
PICTURES = (
    *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "avif", "gif", "bmp", "dib"),
    *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "jxl", "heic", "heif", "ico"),
    *("svg", "pdf", "eps", "ps", "psd", "tga"),
)
#: What somebody may take for a picture and nothing here decodes: a reject, and not read, for the
#: TIFF in a raw file's first bytes is its thumbnail.
NO_PICTURES = {
    **dict.fromkeys(
        (
            *("3fr", "arw", "cr2", "cr3", "crw", "dcr", "dng", "erf", "fff", "iiq", "k25", "kdc"),
            *("mef", "mos", "mrw", "nef", "nrw", "orf", "pef", "raf", "raw", "rw2", "rwl", "sr2"),
            *("srf", "srw", "x3f"),
        ),
        "camera raw: develop it to a JPEG or TIFF first",
    ),
    **dict.fromkeys(
        ("mov", "mp4", "m4v", "avi", "mkv", "webm", "3gp", "mts", "wmv", "insv"),
        "a film, no picture",
    ),
    **dict.fromkeys(
        ("psb", "xcf", "kra", "ai", "cdr", "exr", "hdr", "dds", "djvu", "clip", "sketch"),
        "a format that nothing here decodes",
    ),
}
LARGEST, SMALLEST = 1000, 16  # pictures in a shard, where nobody says how many
HELD_OUT_FROM = 90_000  # number of the first held-out shard: new pictures move none of them
_AT_ONCE = 16  # files that are requested together from an object store


class Listed(NamedTuple):
    """A file as the folder's listing shows it."""

    bytes: int
    version: str  # changes when the file is replaced


class Folder(BaseModel):
    """Settings of the source."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rules: ClassVar[Rules] = Rules()

    folder: Location  # a path, or s3://, gs://, any fsspec URL; sub-folders are searched too
    #: A csv, tsv, jsonl or parquet file in the folder that names the pictures; "": all there are.
    table: str = ""
    image_col: str = "file_name"  # of the table; names are relative to the folder
    caption_col: str = "text"  # of the table
    #: "own": from the table, or a text file beside each picture; "none": a captioner writes them.
    captions: Literal["own", "none"] = "own"
    caption_extension: Annotated[str, Field(pattern=r"^\.\w+$")] = (
        ".txt"  # of texts beside pictures
    )
    encoding: Encoding = "auto"  # of text files and tables: UTF-8, UTF-16, or as it says
    split: str = "train"  # any other is not trained on
    #: This share of the pictures, chosen by a hash of their names, is split "heldout".
    holdout: Share = 0.0
    #: Pictures a shard; 0: a sixteenth of the folder as it is first planned, at least 16 and
    #: at most 1000.
    samples_per_shard: Annotated[int, Field(ge=0, le=10_000)] = 0
    max_file_bytes: Annotated[int, Field(ge=1)] = 100_000_000  # larger files are not read

    _kept: tuple[str, str] | None = PrivateAttr(None)  # root, folder

    @model_validator(mode="after")
    def _one_split(self) -> Folder:
        if self.holdout and self.split != "train":
            raise ValueError(f"holdout={self.holdout}: takes its share of split=train alone")
        return self

    def attach(self, store: Store, folder: str) -> None:
        """Says where the size of a shard is written down."""
        self._kept = (store.root, folder)

    def shards(self) -> list[InputShard]:
        """Lists the folder and reads the table; opens no picture.

        Raises:
            SettingError: no folder, no pictures, no captions, or a table that cannot be read.
            StorageError: the folder's store cannot be listed.
        """
        files = self._listing()
        rows = self._table_rows() if self.table else self._pictures(files)
        texts = {} if self.table or self.captions == "none" else _texts(rows, files, self._sidecar)
        odd = {name: text for name, text in texts.items() if text != self._sidecar(name)}
        beside = [] if self.table else sorted(n for n in files if _ending(n) in NO_PICTURES)
        size = self._per_shard(len(rows))
        shards = []
        for split, start in ((self.split, 0), (SPLIT, HELD_OUT_FROM))[: 2 if self.holdout else 1]:
            mine = [row for row in rows if self._split_of(row.name) == split]
            cuts = range(0, len(mine), size)
            # A file that is none goes with the pictures before it by name, behind all of theirs.
            starts = [mine[first].name for first in cuts]
            others: list[list[Row]] = [[] for _ in cuts]
            for name in beside:
                if cuts and self._split_of(name) == split:
                    others[max(0, bisect_right(starts, name) - 1)].append(Row(name, ""))
            for number, first in enumerate(cuts):
                some = [*mine[first : first + size], *others[number]]
                entries = tuple(_entry(files, row.name, odd.get(row.name, "")) for row in some)
                spec = (self._versions(files, some, texts), _digest(some), first, entries)
                shards.append(InputShard(f"{start + number:05d}", split, spec))
        if self.holdout:
            self._require_held_out({shard.id for shard in shards})
        return shards

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        """The shard's pictures in order; those without a caption are rejects, and not read.

        Raises:
            RuntimeError: the table has changed since the shard was planned.
        """
        _, digest, first, entries = shard.spec
        rows = [Row(entry[0], "") for entry in entries]
        if self.table:
            mine = [r for r in self._table_rows() if self._split_of(r.name) == shard.split]
            rows = mine[first : first + len(entries)]
            if _digest(rows) != digest:
                raise RuntimeError(f"{self.table} has changed since this run began; run it again")
        files = (
            _File(key, row, entry[1], entry[2] if len(entry) > 2 else self._sidecar(row.name))
            for index, (row, entry) in enumerate(zip(rows, entries, strict=True))
            for key in [sample_key(shard.id, index)]
            if only is None or key in only
        )
        at_once = 1 if self._store().local else _AT_ONCE
        while some := list(islice(files, at_once)):
            texts = self._captions(some)
            found = self._read_pictures(some, texts)
            for file, text, data in zip(some, texts, found, strict=True):
                ref = ImageRef(file.key, file.row.name, text if isinstance(text, str) else "")
                if isinstance(text, str) and isinstance(data, bytes):
                    yield RawImage(ref, data)
                    continue
                problem = cast(BadPicture, data)
                foreseen = not self.table and _ending(file.row.name) in NO_PICTURES
                yield Reject(file.key, "download", problem.reason, str(problem), ref, foreseen)

    def at_hand(self) -> bool:
        """Whether its files are on this machine, to be looked at again at no cost."""
        return self._store().local

    def decisive(self) -> dict[str, Any]:
        """A shard's spec says the rest: where the folder lies decides nothing."""
        stated = {} if self.encoding == "auto" else {"encoding": self.encoding}
        return {"captions": self.captions, "max_file_bytes": self.max_file_bytes, **stated}

    def estimate(self, shard: InputShard) -> int:
        # A tar member pads to 512 twice, and each picture has a text and a JSON beside it.
        return sum(
            max(size, 0) + 3072
            for name, size, *_ in shard.spec[3]
            if _ending(name) not in NO_PICTURES
        )

    def samples(self, shard: InputShard) -> int:
        return len(shard.spec[3])

    # Enumeration.

    def _store(self) -> Store:
        return Store(self.folder)

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
        names = sorted(n for n in files if _ending(n) in PICTURES)
        rows = [Row(name, "") for name in names]
        if not names:
            raise SettingError(f"folder={self.folder}: no pictures in it")
        if self.captions == "own" and not _texts(rows, files, self._sidecar):
            tables = [n for n in sorted(files) if n.endswith(ENDINGS)]
            remedy = f"table: {tables[0]}" if tables else "table, or caption_extension"
            raise SettingError(
                f"captions=own: no picture in {self.folder} has a {self.caption_extension} file "
                f"beside it; set {remedy}, or captions: none to let a captioner write them"
            )
        return rows

    def _table_rows(self) -> list[Row]:
        try:
            data = self._store().read(self.table)
        except FileNotFoundError as error:
            raise SettingError(f"table={self.table}: no such file in {self.folder}") from error
        caption_col = self.caption_col if self.captions == "own" else None
        return read_rows(data, self.table, self.image_col, caption_col, self.encoding)

    def _sidecar(self, name: str) -> str:
        return posixpath.splitext(name)[0] + self.caption_extension

    def _versions(self, files: dict[str, Listed], rows: list[Row], texts: dict[str, str]) -> str:
        """A digest that changes when a picture, or the text beside it, is replaced."""
        names = [row.name for row in rows]
        if self.captions == "own" and not self.table:
            pictures = (name for name in names if _ending(name) not in NO_PICTURES)
            names += [texts.get(name, self._sidecar(name)) for name in pictures]
        return fingerprint([_listed(files, name) for name in names])

    def _split_of(self, name: str) -> str:
        return SPLIT if is_held_out(name, self.holdout) else self.split

    def _per_shard(self, pictures: int) -> int:
        """A shard's pictures: as told, or as it was settled under this root."""
        if self.samples_per_shard:
            return self.samples_per_shard
        size = max(SMALLEST, min(LARGEST, -(-pictures // 16)))
        if self._kept is None:
            return size
        store, folder = Store(self._kept[0]), self._kept[1]
        record = f"{folder}/samples_per_shard.json"
        try:
            found = store.read_json(record)
            if isinstance(found, int) and 1 <= found <= 10_000:
                return found
            raise ValueError
        except FileNotFoundError:
            pass
        except ValueError:
            raise SettingError(
                f"{store.url(record)}: is no size of a shard; set samples_per_shard to what it was"
            ) from None
        if store.names(f"{layout.images_group(posixpath.dirname(folder))}/commits"):
            return LARGEST  # begun by a version that knew no other
        store.write_json(record, size)
        return size

    def _require_held_out(self, planned: set[str]) -> None:
        """
        Raises:
            SettingError: shards were made when nothing was held out, and no later ones would take
                their places: training would go on reading what they hold.
        """
        if self._kept is None:
            return
        store, group = Store(self._kept[0]), layout.images_group(posixpath.dirname(self._kept[1]))
        made = {name.removesuffix(".json") for name in store.names(f"{group}/commits")}
        left = sorted(made - planned)
        if left and not any(int(shard) >= HELD_OUT_FROM for shard in made):
            raise SettingError(
                f"holdout={self.holdout}: {store.url(group)} was made without it, and its shards "
                f"{', '.join(left[:5])} would still train on what is held out now; give another "
                "--root, or the source another name"
            )

    # Fetching.

    def _captions(self, files: list[_File]) -> list[str | BadPicture]:
        if self.captions == "none":
            return [""] * len(files)
        if self.table:
            told = f"{self.table}: no {self.caption_col}"
            return [_given(f.row.caption, told) for f in files]
        wanted = [f.text for f in files if _ending(f.row.name) not in NO_PICTURES]
        found = dict(zip(wanted, self._read(wanted), strict=True))
        return [self._caption(f.text, found.get(f.text, b"-")) for f in files]

    def _caption(self, path: str, data: bytes | BadPicture) -> str | BadPicture:
        if isinstance(data, BadPicture):
            return BadPicture("no-caption", f"{path}: {data}")
        try:
            return _given(caption_text(data, self.encoding), f"{path}: empty")
        except BadText as error:
            return BadPicture("caption-encoding", f"{path}: {error}")

    def _read_pictures(
        self, files: list[_File], texts: list[str | BadPicture]
    ) -> list[bytes | BadPicture]:
        """The files' bytes; those without a caption are not read."""
        verdicts: dict[int, bytes | BadPicture] = {}
        for at, (file, text) in enumerate(zip(files, texts, strict=True)):
            if file.row.fault:
                verdicts[at] = BadPicture("malformed-row", f"{self.table}: {file.row.fault}")
            elif why := NO_PICTURES.get(_ending(file.row.name)):
                verdicts[at] = BadPicture("undecodable", f"{file.row.name}: {why}")
            elif isinstance(text, BadPicture):
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
    text: str  # the name of the text file beside it


def _digest(rows: list[Row]) -> str:
    return fingerprint([row if row.fault else row[:2] for row in rows])


def _entry(files: dict[str, Listed], name: str, text: str) -> tuple[str | int, ...]:
    """A file in a shard's spec; with the text beside it where its name is not the usual one."""
    return (name, _listed(files, name).bytes, *([text] if text else ()))


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _texts(
    rows: list[Row], files: dict[str, Listed], sidecar: Callable[[str], str]
) -> dict[str, str]:
    """Picture -> the text file beside it, in whatever case either is written: IMG_1.JPG has
    img_1.TXT, unless another picture is named just like that."""
    by_lower: dict[str, list[str]] = {}
    for name in files:
        by_lower.setdefault(name.lower(), []).append(name)
    stems = {posixpath.splitext(row.name)[0] for row in rows}
    found = {}
    for row in rows:
        usual = sidecar(row.name)
        if usual in files:
            found[row.name] = usual
            continue
        stem = posixpath.splitext(row.name)[0]
        others = by_lower.get(usual.lower(), [])
        own = [name for name in others if posixpath.splitext(name)[0] == stem]
        free = [name for name in others if posixpath.splitext(name)[0] not in stems]
        if choice := own or free:
            found[row.name] = min(choice)
    return found


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

"""Any dataset of parquet files with a picture and its text in each row: of the Hugging Face hub, or
a folder of such files, local or any fsspec URL.

A file is one input shard, or several of whole row groups where it has more rows than a shard takes.
A shard's spec names its file by content (on the hub by the file's sha256, elsewhere by its
footer), so a new file, or a commit that only mends the README, changes no other shard.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from pipeline.core.errors import SettingError, nearest
from pipeline.core.links import harmless
from pipeline.core.location import Location
from pipeline.core.rules import Rules, readable
from pipeline.core.samples import ImageRef, InputShard, RawImage, Reject, sample_key
from pipeline.core.staged_file import scratch
from pipeline.core.store import Store
from pipeline.sources.files import hub, resumable, transfer
from pipeline.sources.tables import parquet_rows
from pipeline.sources.tables.captions import choose
from pipeline.sources.tables.parquet_rows import Footer

_HUB = "hf://datasets/"
CONVERTED = "refs/convert/parquet"  # the hub's own branch of datasets that are not parquet
BYTES_A_PICTURE = 120_000  # in a tar, roughly: a photograph whose shorter side is 512
_REQUESTS = 16  # footers that are asked for at once


class HubDataset(BaseModel):
    """Settings of the source."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rules: ClassVar[Rules] = Rules()

    repo: Location  # "OWNER/NAME", "OWNER/NAME@REVISION"; or a folder of parquet files, or s3://…
    #: Splits to take, separated by commas; "validation=val" takes one under another name. Only
    #: "train" is trained on. A file belongs to the split that is a word of its path.
    splits: str = "train"
    files: str = "*"  # only files whose path matches, e.g. "en/*"
    image_col: str = "image"  # struct of bytes and path, as the hub writes pictures; or binary
    caption_col: str = "text"  # a string or a list of strings; "" for none, for a captioner
    #: Of a list: "first"; "random", by seed and key; "all": random, and the list is kept as well.
    captions: Literal["first", "random", "all"] = "random"
    seed: int = 0  # of the caption that is drawn, with the sample's key
    samples_per_shard: Annotated[int, Field(ge=1, le=10_000)] = 10_000  # rows a shard
    max_file_bytes: Annotated[int, Field(ge=1)] = 100_000_000  # larger pictures are left out

    _commit: str = PrivateAttr("")  # what the revision stands for, while a run lasts

    def shards(self) -> list[InputShard]:
        """Reads the listing and each file's footer: of the hub, those it has not seen before.

        Raises:
            SettingError: no such dataset, no leave, no parquet files, or a missing column.
        """
        found: list[InputShard] = []
        paths = self._paths()
        with ThreadPoolExecutor(_REQUESTS) as threads:
            files = list(threads.map(self._file, (path for path, _ in paths)))
        for (path, split), file in zip(paths, files, strict=True):
            self._require_columns(path, file.footer)
            for first, rows in parquet_rows.ranges(file.footer.groups, self.samples_per_shard):
                spec = (path, file.content, first, rows, file.footer.rows)
                found.append(InputShard(f"{len(found):05d}", split, spec))
        if not found:
            raise SettingError(f"repo={self.repo}: its parquet files have no rows")
        return found

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        path, content, first, rows, total = shard.spec
        columns = [self.image_col, *([self.caption_col] if self.caption_col else [])]
        checksum = content if content.startswith("sha256:") else ""
        # Of a file with several shards a host keeps its copy.
        with transfer.local(self._url(path), checksum=checksum, keep=rows < total) as local:
            if not checksum and _footer(str(local)).content != content:
                raise RuntimeError(f"{path} has changed since this run began; run it again")
            for index, row in enumerate(parquet_rows.read_rows(local, first, rows, columns)):
                key = sample_key(shard.id, index)
                if only is None or key in only:
                    yield self._sample(key, f"{path}#{first + index}", row)

    def decisive(self) -> dict[str, Any]:
        """What is made of a row of a given file; which files there are is in the specs."""
        names = ("image_col", "caption_col", "captions", "seed", "max_file_bytes")
        return {name: getattr(self, name) for name in names}

    def estimate(self, shard: InputShard) -> int:
        return self.samples(shard) * BYTES_A_PICTURE

    def samples(self, shard: InputShard) -> int:
        return shard.spec[3]

    # Enumeration.

    @property
    def _on_hub(self) -> bool:
        if "://" in self.repo.removeprefix(_HUB) or Path(self.repo).is_dir():
            return False
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", self.repo.removeprefix(_HUB)) is None:
            raise SettingError(f"repo={self.repo}: no such folder, and no OWNER/NAME of the hub")
        return True

    def _revision(self) -> tuple[str, str]:
        """ "owner/name", revision."""
        name, _, revision = self.repo.removeprefix(_HUB).partition("@")
        return name, revision or "main"

    def _paths(self) -> list[tuple[str, str]]:
        """(path, our split) of every parquet file that is wanted, splits and paths in order."""
        if self._on_hub:
            name, revision = self._revision()
            self._commit = hub.commit(name, revision)
            names = hub.files(name, self._commit)
        else:
            names = sorted(entry.path for entry in self._store().walk(""))
        files = [n for n in names if n.endswith(".parquet") and fnmatchcase(n, self.files)]
        if not files:
            others = f"; `repo: {self.repo}@{CONVERTED}` may have" if self._on_hub else ""
            raise SettingError(f"repo={self.repo}: no parquet file matches {self.files!r}{others}")
        found: list[tuple[str, str]] = []
        for part in self.splits.split(","):
            theirs, _, ours = part.strip().partition("=")
            if not theirs:
                raise SettingError(f"splits={self.splits}: name at least one, as in their paths")
            chosen = [f for f in files if re.search(rf"(^|[^a-z]){re.escape(theirs)}([^a-z]|$)", f)]
            if not chosen:
                raise SettingError(
                    f"splits={self.splits}: no parquet file of {self.repo} has {theirs!r} for a "
                    f"word of its path; there are: {', '.join(files[:3])}"
                )
            if twice := {file for file, _ in found} & set(chosen):
                raise SettingError(
                    f"splits={self.splits}: {min(twice)} would come twice; name a split once, or "
                    "leave out with `files` what has two of them in its path"
                )
            found += [(file, ours or theirs) for file in chosen]
        return found

    def _store(self) -> Store:
        return Store(self.repo)

    def _url(self, path: str) -> str:
        """Where transfer.local finds a file."""
        if not self._on_hub:
            return self._store().url(path)
        name, revision = self._revision()
        return hub.address(name, self._commit or revision, path)

    def _file(self, path: str) -> _File:
        try:
            return _footer_on_hub(self._url(path)) if self._on_hub else _footer(self._url(path))
        except ValueError as error:
            raise SettingError(f"repo={self.repo}: {path}: {error}") from error

    def _require_columns(self, path: str, footer: Footer) -> None:
        for setting in ("image_col", "caption_col"):
            column, known = getattr(self, setting), footer.schema.names
            if column and column not in known:
                raise SettingError(
                    f"{setting}={column}: no such column in {path}{nearest(column, known)}; there "
                    f"are: {', '.join(known)}"
                )
        if self.caption_col:
            kind = footer.schema.field(self.caption_col).type
            if not parquet_rows.is_text(kind):
                raise SettingError(
                    f"caption_col={self.caption_col}: is of type {kind} in {path}; name a column "
                    "of text, or of lists of it"
                )

    # Rows.

    def _sample(self, key: str, place: str, row: dict[str, Any]) -> RawImage | Reject:
        captions = self._captions(row)
        ref = ImageRef(key, place, captions[0] if captions else "")

        def reject(reason: str, detail: str) -> Reject:
            return Reject(key, "download", reason, f"{place}: {detail}", ref)

        if not captions:
            if any(isinstance(text, bytes) for text in self._several(row)):
                return reject("caption-encoding", f"{self.caption_col} is no UTF-8")
            return reject("no-caption", f"{self.caption_col} is empty")
        cell = row[self.image_col]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            found = "empty" if data is None else f"of type {type(data).__name__}"
            return reject("undecodable", f"{self.image_col} is {found}")
        if len(data) > self.max_file_bytes:
            return reject(
                "too-large", f"{len(data)} bytes, max_file_bytes is {self.max_file_bytes}"
            )
        caption = captions[0] if self.captions == "first" else choose(captions, self.seed, key)
        references = captions if self.captions == "all" and self.caption_col else ()
        return RawImage(ImageRef(key, place, caption, references), data)

    def _captions(self, row: dict[str, Any]) -> tuple[str, ...]:
        """Those that say something."""
        if not self.caption_col:
            return ("",)
        given = (t for t in self._several(row) if not (t is None or t != t or isinstance(t, bytes)))
        return tuple(str(text) for text in given if readable(str(text)))

    def _several(self, row: dict[str, Any]) -> list[Any]:
        """A row's captions; bytes stand for one that is no UTF-8."""
        cell = row[self.caption_col] if self.caption_col else None
        return cell if isinstance(cell, list) else [cell]


class _File(NamedTuple):
    content: str  # what names these very bytes
    footer: Footer


def _footer(url: str) -> _File:
    import fsspec

    with fsspec.open(url, "rb") as file:
        size = file.seek(0, 2)  # pyright: ignore
        tail = _last(file, size, min(size, parquet_rows.TAIL))
        length = parquet_rows.footer_length(tail)
        if length > len(tail):
            tail = _last(file, size, min(size, length))
        footer = parquet_rows.parse_footer(tail[-length:])
    return _File(_by_footer(size, footer), footer)


def _by_footer(size: int, footer: Footer) -> str:
    return f"{size}-{footer.digest}"


def _last(file: Any, size: int, count: int) -> bytes:
    file.seek(size - count)
    return file.read(count)


def _footer_on_hub(url: str) -> _File:
    """Two requests, or none where this host has seen the file: at a commit it does not change."""
    name = hashlib.sha256(url.encode()).hexdigest()[:24]
    kept = scratch() / f"footer-{name}"
    if not kept.exists():
        content, footer = hub.patiently(hub.parse(url).repo, lambda: _asked(url))
        temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
        temporary.write_bytes(content.encode() + b"\n" + footer)
        os.replace(temporary, kept)
    content, _, footer = kept.read_bytes().partition(b"\n")
    return _File(content.decode(), parquet_rows.parse_footer(footer))


def _asked(url: str) -> tuple[str, bytes]:
    """What names the file's content, and its footer's bytes."""
    link = hub.link(url)
    size = link.facts.size or 0
    tail = _range(link, max(0, size - parquet_rows.TAIL))
    length = parquet_rows.footer_length(tail)
    if length > len(tail):
        tail = _range(link, max(0, size - length))
    footer = tail[-length:]
    named = _by_footer(size, parquet_rows.parse_footer(footer))
    return link.facts.checksum or named, footer


def _range(link: hub.Link, start: int) -> bytes:
    """A file from a byte on. The token does not follow redirects to another host.

    Raises:
        Interrupted: ask again.
    """
    import requests

    headers = {**link.headers, "Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    try:
        with requests.get(link.url, headers=headers, timeout=30, stream=True) as answer:
            if answer.status_code not in (200, 206):
                raise resumable.Interrupted(f"HTTP {answer.status_code}")
            if answer.status_code == 200 and start:
                raise resumable.Interrupted("the whole file came instead of its end")
            return answer.content
    except requests.RequestException as error:
        raise resumable.Interrupted(harmless(str(error))) from None

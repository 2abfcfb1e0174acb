"""SA-1B: 11 million photographs of at least 1500 pixels, in tars that Meta gives out by links.

The links expire, so only the tars' names are part of a shard; a link is looked up when its tar is
fetched, and with a new list a transfer that broke off goes on. Captions are the caption stage's, or
those that PixArt-alpha has published (LLaVA's, of 10 million of the pictures).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.core.errors import SettingError
from pipeline.core.location import Location
from pipeline.core.rules import Rules, readable
from pipeline.core.samples import InputShard, RawImage, Reject
from pipeline.sources.files import archives, resumable, transfer
from pipeline.sources.files.hosted import Hosted
from pipeline.sources.files.lookup import Row, rows_of, sorted_rows
from pipeline.sources.files.packed import pictures
from pipeline.sources.tables.captions import BadText, caption_text

ARCHIVE = re.compile(r"sa_(\d{6})\.tar")
PICTURE = re.compile(r"sa_(\d{1,9})\.\w+")
TEXT = re.compile(r"(?:^|/)sa_(\d{1,9})\.txt$")
SCHEMES = ("http://", "https://", "s3://", "gs://")
CAPTIONS = "SA1B_caption.tar.gz"
SPAN = 50_000  # pictures whose captions are sorted together
MAX_CAPTION_BYTES = 1 << 20


class SA1B(Hosted):
    """Settings of the source."""

    rules: ClassVar[Rules] = Rules()

    #: Meta's list: a TSV with the columns file_name and cdn_link, a path or URL that every worker
    #: can read; from https://ai.meta.com/datasets/segment-anything-downloads/.
    links: Location = Field(default="", repr=False)  # it may be a signed URL itself
    archives: Location = ""  # instead of links: a folder that has the tars
    #: "none": the caption stage writes them. "pixart": published ones; pictures without are
    #: rejected.
    captions: Literal["none", "pixart"] = "none"
    base: str = "hf://datasets/PixArt-alpha/SAM-LLaVA-Captions10M"  # of those captions

    def bases(self) -> list[str]:
        return [self.base] if self.captions == "pixart" else []

    def shards(self) -> list[InputShard]:
        """A tar is a shard, and has its number: a list in another order, or of other tars, changes
        none."""
        return [
            InputShard(f"{int(number[1]):05d}", "train", (name,))
            for name in sorted(self._places())
            if (number := ARCHIVE.fullmatch(name))
        ]

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        """The tar's photographs in its order.

        Raises:
            TransferError, BrokenArchive: it cannot be had whole.
            SettingError: the list has no link to it any more.
        """
        (name,) = shard.spec
        place = self._places().get(name)
        if place is None:
            raise SettingError(f"links: no longer has {name}; get a list that has it")
        # Wherever it comes from, it is the same file: a new link goes on with it.
        with transfer.local(place, identity=f"sa1b/{name}") as path:
            describe = self._published(path) if self.captions == "pixart" else lambda name: ""
            yield from pictures(path, f"sa1b:{name}", shard, describe, only, digits=5)

    def decisive(self) -> dict[str, Any]:
        return {**super().decisive(), "captions": self.captions}

    def estimate(self, shard: InputShard) -> int:
        return self.samples(shard) * 150_000

    def samples(self, shard: InputShard) -> int:
        return 11_186

    def _places(self) -> dict[str, str]:
        """Tar name -> where it is."""
        if bool(self.links) == bool(self.archives):
            raise SettingError(
                "sa1b: set links (Meta's list, a TSV with file_name and cdn_link, from "
                "https://ai.meta.com/datasets/segment-anything-downloads/) or archives (a folder "
                "that has the tars)"
            )
        if self.archives:
            found = {p.name: str(p) for p in Path(self.archives).glob("sa_*.tar")}
            if not found:
                raise SettingError(f"archives={self.archives}: has no sa_*.tar")
            return found
        try:
            with (
                transfer.local(self.links) as path,
                open(path, encoding="utf-8-sig", newline="") as file,
            ):
                return _links(file)
        except (resumable.TransferError, UnicodeDecodeError, csv.Error) as error:
            raise SettingError(f"links: cannot be read: {error}") from None

    def _published(self, tar: Path):
        """What says a picture's caption, from those of this tar's pictures."""
        found = {int(match[1]) for name in archives.names(tar) if (match := _picture(name))}
        captions: dict[int, str] = {}
        if found:
            url = self.url(CAPTIONS)
            table = sorted_rows(f"sa1b {transfer.stamped(url)}", lambda: _published_rows(url), SPAN)
            captions = {r.number: r.caption for r in rows_of(table, min(found), max(found))}

        def describe(name: str) -> str | tuple[str, str]:
            match = _picture(name)
            caption = captions.get(int(match[1]), "") if match else ""
            return caption or ("no-caption", f"{name}: PixArt's archive has none")

        return describe


def _picture(name: str) -> re.Match[str] | None:
    return PICTURE.fullmatch(PurePosixPath(name).name) if archives.is_picture(name) else None


def _links(lines: Iterator[str]) -> dict[str, str]:
    """Tar name -> link. No message holds a link."""
    reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    if not {"file_name", "cdn_link"} <= set(reader.fieldnames or ()):
        raise SettingError("links: needs a first line with file_name and cdn_link, tab between")
    found: dict[str, str] = {}
    for row in reader:
        name, link = row["file_name"] or "", row["cdn_link"] or ""
        if not ARCHIVE.fullmatch(name):
            continue  # Meta's list also names a few files that hold no pictures
        if not link.startswith(SCHEMES):
            raise SettingError(f"links: line {reader.line_num}: {name} has no http(s) link")
        found[name] = link  # of a list that was appended to, the newest
    if not found:
        raise SettingError("links: names no sa_NNNNNN.tar")
    return found


def _published_rows(url: str) -> Iterator[Row]:
    """PixArt's archive: a text file sa_N.txt a picture, 10 million of them."""
    with transfer.local(url) as path:
        texts = archives.members(path, limit=MAX_CAPTION_BYTES, unique=False)
        for member in texts:
            match = TEXT.search(member.name)
            if match and not member.reason:
                try:
                    caption = readable(caption_text(member.data))
                except BadText:
                    continue  # its picture is rejected as one that has none
                if caption:
                    yield Row(int(match[1]), f"sa_{match[1]}", caption)

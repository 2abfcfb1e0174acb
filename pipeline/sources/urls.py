"""URLs: any table of links and captions, as img2dataset reads it: csv, tsv, json(l), parquet, txt.

Keys are 5 digits of shard and 4 of row, so a list that img2dataset was given has the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from pipeline.core.errors import SettingError
from pipeline.core.location import Location
from pipeline.core.rules import Rules, readable
from pipeline.core.samples import ImageRef, InputShard, RawImage, Reject, sample_key
from pipeline.core.store import Store
from pipeline.core.urls import stripped
from pipeline.sources.tables import url_lists
from pipeline.sources.tables.captions import Encoding
from pipeline.sources.tables.url_lists import Row
from pipeline.sources.tables.url_table import ENDINGS, UrlList, shown
from pipeline.sources.web.fetch import fetch_all
from pipeline.sources.web.settings import FetchError, HttpSettings, listed

BYTES_A_PICTURE = 120_000  # in a tar, roughly: a photograph whose shorter side is 512

Hash = Literal["md5", "sha256", "sha512"]


def _pair(value: Any) -> Any:
    found = listed(value)
    if found is not None and len(found) not in (0, 2):
        raise ValueError("write COLUMN,KIND, e.g. checksum,md5")
    return found or None


class Urls(HttpSettings):
    """Where the list is and how it is read; how servers are asked is in HttpSettings."""

    rules: ClassVar[Rules] = Rules()

    url_list: Annotated[Location, Field(min_length=1)]  # a file, or a folder of files of one format
    #: By the name's ending, or one of csv, tsv, json, jsonl, parquet, txt.
    input_format: Literal[("auto", *ENDINGS)] = "auto"  # pyright: ignore
    url_col: str = "url"  # the column of links
    #: None, or empty: pictures without captions, for a captioner to write.
    caption_col: Annotated[str | None, BeforeValidator(lambda v: v or None)] = "caption"
    #: [column, kind]: a picture with another hash is left out.
    verify_hash: Annotated[tuple[str, Hash] | None, BeforeValidator(_pair)] = None
    number_sample_per_shard: Annotated[int, Field(ge=1, le=10_000)] = 10_000  # rows a shard
    encoding: Encoding = "auto"  # of csv, tsv, json, jsonl and txt: UTF-8, UTF-16, or as it says

    _kept: tuple[str, str] | None = PrivateAttr(None)  # root, folder
    _shards: list[InputShard] | None = PrivateAttr(None)

    def attach(self, store: Store, folder: str) -> None:
        """Says where the split list lies; in the process that plans and in each worker."""
        self._kept = (store.root, folder)

    def shards(self) -> list[InputShard]:
        """Of each file in order: a shard every `number_sample_per_shard` rows. A list that changed
        since the last plan is read again; within a run it stays as it was found."""
        if self._shards is None:
            found = url_lists.parts(*self._place(), self._list())
            if not found:
                raise SettingError(f"url_list={shown(self.url_list)}: no row in it that is wanted")
            self._shards = [
                InputShard(f"{n:05d}", "train", (name, rows))
                for n, (name, rows) in enumerate(found)
            ]
        return self._shards

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        wanted = []
        for index, row in enumerate(url_lists.read(*self._place(), shard.spec[0])):
            key = sample_key(shard.id, index)
            if only is None or key in only:
                wanted.append((key, row, self._fault(key, row)))
        links = [row.url for _, row, fault in wanted if fault is None and row.url]
        bodies = fetch_all(self, links)
        try:
            for key, row, fault in wanted:
                yield fault or self._judged(key, row, next(bodies))
        finally:
            bodies.close()

    def decisive(self) -> dict[str, Any]:
        """What is accepted of a given list. Patience and pace are not in it: who raises them wants
        more pictures, not all of them again."""
        return {
            "verify_hash": self.verify_hash and self.verify_hash[1],
            "max_bytes": self.max_bytes,
            "robots": self.robots,
            "disallowed_header_directives": sorted(self.disallowed_header_directives),
            "user_agent_token": self.user_agent_token,
            "allow_private_hosts": self.allow_private_hosts,
        }

    def estimate(self, shard: InputShard) -> int:
        return self.samples(shard) * BYTES_A_PICTURE

    def samples(self, shard: InputShard) -> int:
        return shard.spec[1]

    def _list(self) -> UrlList:
        return UrlList(
            self.url_list,
            self.input_format,
            self.url_col,
            self.caption_col,
            self.verify_hash,
            self.number_sample_per_shard,
            encoding=self.encoding,
        )

    def _place(self) -> tuple[Store, str]:
        if self._kept is None:
            raise RuntimeError("attach() comes first")
        return Store(self._kept[0]), self._kept[1]

    def _fault(self, key: str, row: Row) -> Reject | None:
        """What is the matter with a row itself."""
        ref = _ref(key, row)
        if row.fault:
            return Reject(key, "download", "malformed-row", row.fault, ref)
        if not ref.url:
            return Reject(key, "download", "refused", "no link in this row", ref)
        if self.caption_col is not None and not readable(ref.caption):
            return Reject(key, "download", "no-caption", "no caption in this row", ref)
        if self.verify_hash is not None and not (row.hash or "").strip():
            return Reject(key, "download", "hash-mismatch", "no hash in this row", ref)
        return None

    def _judged(self, key: str, row: Row, body: bytes | FetchError) -> RawImage | Reject:
        ref = _ref(key, row)
        if isinstance(body, FetchError):
            return Reject(key, "download", body.reason, str(body), ref)
        if self.verify_hash is not None:
            kind, expected = self.verify_hash[1], (row.hash or "").strip().lower()
            found = hashlib.new(kind, body).hexdigest()
            if found != expected:
                detail = f"{kind} {found[:12]}…, the list says {expected[:12]}…"
                return Reject(key, "download", "hash-mismatch", detail, ref)
        return RawImage(ref, body)


def _ref(key: str, row: Row) -> ImageRef:
    return ImageRef(key, stripped(row.url or ""), row.caption or "")

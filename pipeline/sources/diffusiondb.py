"""DiffusionDB Large: 14 million pictures of Stable Diffusion 1.x with their prompts, on the hub."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar

from pydantic import Field

from pipeline.core.errors import SettingError
from pipeline.core.links import public
from pipeline.core.rules import Rules, readable
from pipeline.core.samples import InputShard, RawImage, Reject
from pipeline.sources.files import transfer
from pipeline.sources.files.hosted import Hosted
from pipeline.sources.files.lookup import Row, rows_of, sorted_rows
from pipeline.sources.files.packed import pictures
from pipeline.sources.tables.table_rows import text_values

PARTS = 14_000
FIRST_FOLDER = 10_000  # parts in it; the others are in the second
METADATA = "metadata-large.parquet"
SPAN = 64  # parts whose rows are sorted together
BATCH = 50_000  # rows of the metadata in memory


class DiffusionDB(Hosted):
    """Settings of the source."""

    rules: ClassVar[Rules] = Rules()

    base: str = "hf://datasets/poloclub/diffusiondb"
    #: Pictures whose own score, or whose prompt's, is higher are rejected ("filtered").
    max_nsfw: Annotated[float, Field(ge=0)] = 0.2

    def shards(self) -> list[InputShard]:
        """A part is a shard, and has its number: 00001-14000."""
        return [
            InputShard(f"{n:05d}", "train", (f"diffusiondb-large-part-{_folder(n)}/{_zip(n)}",))
            for n in range(1, PARTS + 1)
        ]

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        """The part's pictures in the zip's order.

        Raises:
            TransferError, BrokenArchive: it cannot be had whole.
        """
        (name,) = shard.spec
        number = int(PurePosixPath(name).stem.removeprefix("part-"))
        metadata = self.url(METADATA)
        with transfer.local(self.url(name)) as path:
            table = sorted_rows(
                f"diffusiondb {transfer.stamped(metadata)}", lambda: _listed(metadata), SPAN
            )
            rows = {row.name: row for row in rows_of(table, number, number)}

            def describe(picture: str) -> str | tuple[str, str]:
                row = rows.get(picture)
                if row is None:
                    return "no-caption", f"{picture}: the metadata does not name it"
                if not row.score <= self.max_nsfw:
                    return "filtered", f"{picture}: NSFW {row.score:.3g} > {self.max_nsfw}"
                return row.caption or ("no-caption", f"{picture}: an empty prompt")

            yield from pictures(path, self.url(name), shard, describe, only, digits=4)

    def decisive(self) -> dict[str, Any]:
        return {**super().decisive(), "max_nsfw": self.max_nsfw}

    def estimate(self, shard: InputShard) -> int:
        return self.samples(shard) * 465_000  # lossless WebP, which the rules leave as it is

    def samples(self, shard: InputShard) -> int:
        return 1_000


def _folder(part: int) -> int:
    return 1 if part <= FIRST_FOLDER else 2


def _zip(part: int) -> str:
    return f"part-{part:06d}.zip"


def _listed(url: str) -> Iterator[Row]:
    """(part, picture's name, prompt, the higher NSFW score) of every row of the metadata."""
    import pyarrow.parquet as pq

    columns = ["part_id", "image_name", "prompt", "image_nsfw", "prompt_nsfw"]
    with transfer.local(url) as path, pq.ParquetFile(path) as file:
        if missing := set(columns) - set(file.schema_arrow.names):
            raise SettingError(
                f"{public(url)}: has no column {min(missing)}: not the metadata of "
                "DiffusionDB Large; see `base`"
            )
        for batch in file.iter_batches(BATCH, columns=columns, use_threads=False):
            texts = (text_values(batch.column(name)) for name in columns[1:3])
            others = (batch.column(name).to_pylist() for name in (columns[0], *columns[3:]))
            for name, prompt, part, *scores in zip(*texts, *others, strict=True):
                if isinstance(name, str):
                    prompt = prompt if isinstance(prompt, str) else ""  # none, or no UTF-8
                    yield Row(part, name, readable(prompt), _worst(scores))


def _worst(scores: list[float | None]) -> float:
    """The higher score; one that is missing counts as the worst."""
    return max(math.inf if s is None or math.isnan(s) else s for s in scores)

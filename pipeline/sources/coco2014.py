"""COCO 2014 validation: 40,504 photographs with five or more captions each, to evaluate with.

All captions are kept as references; the first is the one that is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field

from pipeline.core.errors import SettingError
from pipeline.core.links import public
from pipeline.core.rules import Rules, readable
from pipeline.core.samples import ImageRef, InputShard, RawImage, Reject, sample_key
from pipeline.sources.files import archives, transfer
from pipeline.sources.files.hosted import Hosted
from pipeline.sources.files.lookup import Row, rows_of, sorted_rows

PICTURES = "zips/val2014.zip"
ANNOTATIONS = "annotations/annotations_trainval2014.zip"
CAPTIONS = "annotations/captions_val2014.json"  # in it
#: What the official server has had since 2018. It has no TLS that fits its name.
OFFICIAL = "http://images.cocodataset.org"
CHECKSUMS = {
    PICTURES: "md5:a3d79f5ed8d289b7a7554ce06a5782b3",
    ANNOTATIONS: "md5:0a379cfc70b0e71301e0f377548639bd",
}
CAPTIONS_BYTES = 256 << 20  # it has 33 MB


class Coco2014(Hosted):
    """Settings of the source."""

    #: Whole and all of them: scores are compared with other people's.
    rules: ClassVar[Rules] = Rules(image_size=None, min_image_size=0, drop_duplicates=False)
    images: ClassVar[int] = 40_504

    base: str = OFFICIAL
    samples_per_shard: Annotated[int, Field(ge=1, le=10_000)] = 5_000  # pictures a shard

    def shards(self) -> list[InputShard]:
        """Pictures in order of their COCO id, samples_per_shard a shard."""
        size = self.samples_per_shard
        return [
            InputShard(f"{start // size:05d}", "val", (start, min(start + size, self.images)))
            for start in range(0, self.images, size)
        ]

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        """The shard's pictures in order of id.

        The zip stays in the scratch folder: every shard on this host reads it.

        Raises:
            TransferError, BrokenArchive: the zips cannot be had whole.
        """
        first, last = shard.spec
        annotations, checksum = self.url(ANNOTATIONS), self._checksum(ANNOTATIONS)
        table = sorted_rows(
            f"coco2014 {transfer.stamped(annotations)}",
            lambda: _captions(annotations, checksum),
            1 << 30,
        )
        numbers = _numbers(table)
        if len(numbers) != self.images:
            raise SettingError(
                f"base={self.base}: {len(numbers)} pictures have captions, COCO 2014 has "
                f"{self.images}; it is another dataset"
            )
        numbers = numbers[first:last]
        found: dict[int, list[Row]] = {number: [] for number in numbers}
        for row in rows_of(table, numbers[0], numbers[-1]):
            found[row.number].append(row)
        keyed = {sample_key(shard.id, index): rows for index, rows in enumerate(found.values())}
        wanted = {key: rows for key, rows in keyed.items() if only is None or key in only}
        zipped, checksum = self.url(PICTURES), self._checksum(PICTURES)
        with transfer.local(zipped, checksum=checksum, keep=True) as path:
            names = [f"val2014/{rows[0].name}" for rows in wanted.values()]
            for (key, rows), member in zip(
                wanted.items(), archives.named(path, names), strict=True
            ):
                yield _sample(key, rows, member, self.base)

    def estimate(self, shard: InputShard) -> int:
        return self.samples(shard) * 167_000

    def samples(self, shard: InputShard) -> int:
        first, last = shard.spec
        return last - first

    def _checksum(self, name: str) -> str:
        return CHECKSUMS[name] if self.base == OFFICIAL else ""


def _sample(
    key: str, rows: list[Row], member: archives.Member | None, base: str
) -> RawImage | Reject:
    name = rows[0].name
    captions = tuple(row.caption for row in rows if row.caption)
    ref = ImageRef(key, f"{base}/val2014/{name}", captions[0] if captions else "", captions)
    if member is None:
        return Reject(key, "download", "no-picture", f"{name}: not in val2014.zip", ref)
    if member.reason:
        return Reject(key, "download", member.reason, member.detail, ref)
    if not captions:
        return Reject(key, "download", "no-caption", f"{name}: only empty captions", ref)
    return RawImage(ref, member.data)


def _numbers(table: Any) -> list[int]:
    """The COCO ids that have captions, in order."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    column = pq.read_table(table, columns=["number"], use_threads=False).column("number")
    return pc.unique(column).to_pylist()  # pyright: ignore


def _captions(url: str, checksum: str) -> Iterator[Row]:
    """(COCO id, file name, caption), in the order in which upstream has them."""
    with transfer.local(url, checksum=checksum) as path:
        (member,) = archives.named(path, [CAPTIONS], limit=CAPTIONS_BYTES)
    if member is None or member.reason:
        raise archives.BrokenArchive(f"{public(url)}: no {CAPTIONS} that can be read")
    try:
        record = json.loads(member.data)
        names = {image["id"]: image["file_name"] for image in record["images"]}
        rows = [(row["image_id"], row["caption"]) for row in record["annotations"]]
        yield from (Row(number, names[number], readable(caption)) for number, caption in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise archives.BrokenArchive(
            f"{public(url)}: {CAPTIONS} has no captions as COCO writes them: "
            f"{type(error).__name__}: {error}"
        ) from None

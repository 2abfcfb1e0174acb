"""`pipeline run caption`: a captioner's sentences beside the downloaded shards, tars untouched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

import pyarrow as pa

import captioning
from pipeline.core import drops, layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import MAX_REJECT_RATE, Commit, plain_stem, write_shard
from pipeline.core.errors import SettingError, nearest
from pipeline.core.images import BadPicture, decode
from pipeline.core.samples import InputShard, Reject
from pipeline.core.store import Store
from pipeline.core.tables import to_parquet
from pipeline.stages import Job, Needs
from pipeline.stages.images import images_commit, read_images

VERSION = 2  # bump when the bytes this stage writes change
BYTES_A_CAPTION = 400  # in the parquet, at most, of a long one


class CaptionStage:
    name = "caption"
    needs = Needs()

    def __init__(
        self, source: str, captioner: str, max_reject_rate: float = MAX_REJECT_RATE
    ) -> None:
        if captioner not in captioning.CAPTIONERS:
            raise SettingError(
                f"captioner={captioner}: unknown{nearest(captioner, captioning.CAPTIONERS)}; "
                f"known: {', '.join(captioning.CAPTIONERS)}"
            )
        self.source = source
        self.captioner = captioner
        self.max_reject_rate = max_reject_rate

    def groups(self) -> list[str]:
        return [layout.captions_group(self.source, self.captioner)]

    def plan(self, catalog: Catalog) -> Iterable[Job]:
        (group,) = self.groups()
        common = {
            "stage": self.name,
            "version": VERSION,
            "captioner": self.captioner,
            "revision": captioning.load(self.captioner).revision,
        }
        dropped = catalog.dropped(self.source)
        for shard, head in catalog.heads(layout.images_group(self.source)).items():
            keys = dropped.get(shard, frozenset())
            inputs = {**common, "images": head.content, **drops.inputs(keys)}
            yield Job(InputShard(shard, head.split), {group: inputs}, keys, head.samples)

    def estimate(self, job: Job, group: str) -> int:
        return job.samples * BYTES_A_CAPTION

    def open(self, store: Store) -> _Worker:
        return _Worker(self, store)

    def manifest(self, group: str) -> None:
        return None


class _Worker:
    def __init__(self, stage: CaptionStage, store: Store) -> None:
        self.stage = stage
        self.store = store
        self.captioner = captioning.load(stage.captioner)
        self.counters = Counter({f"loaded captioner {stage.captioner}": 1})

    def take_counters(self) -> Counter[str]:
        taken, self.counters = self.counters, Counter()
        return taken

    def __call__(self, job: Job) -> dict[str, Commit]:
        return {group: self._make(job, group) for group in job.groups}

    def _make(self, job: Job, group: str) -> Commit:
        stage, store = self.stage, self.store
        images = layout.images_group(stage.source)
        content = job.groups[group]["images"]
        keys, pictures, rejects = [], [], []
        for image in read_images(
            store, images, images_commit(store, images, job.shard.id, content)
        ):
            if image.key in job.dropped:
                continue
            try:
                pictures.append(decode(image.data))
                keys.append(image.key)
            except BadPicture as error:
                rejects.append(Reject(image.key, stage.name, error.reason, str(error)))
        rows = []
        for key, caption in zip(keys, self.captioner(pictures), strict=True):
            row = asdict(caption)
            rows.append({"key": key, "caption": row.pop("text"), **row})
        files = {".parquet": to_parquet(pa.Table.from_pylist(rows, schema=_SCHEMA))}
        stem = plain_stem(store, group, job.shard.id, files)
        return write_shard(
            store,
            group,
            job.shard,
            job.groups[group],
            files={stem + ending: data for ending, data in files.items()},
            keys=keys,
            rejects=rejects,
            max_reject_rate=stage.max_reject_rate,
        )


_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("captioner", pa.string()),
        ("revision", pa.string()),
        ("prompt", pa.string()),
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
    ]
)

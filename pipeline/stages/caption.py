"""`pipeline run caption`: a captioner's sentences beside the downloaded shards, tars untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict

import pyarrow as pa

import captioning
from pipeline.core import layout
from pipeline.core.commits import Commit, read_commits, write_shard
from pipeline.core.errors import SettingError, nearest
from pipeline.core.images import BadPicture, decode
from pipeline.core.samples import InputShard, Reject
from pipeline.core.store import Store
from pipeline.core.tables import to_parquet
from pipeline.stages import Job
from pipeline.stages.images import read_images

VERSION = 1


class CaptionStage:
    name = "caption"

    def __init__(self, source: str, captioner: str) -> None:
        if captioner not in captioning.CAPTIONERS:
            raise SettingError(
                f"captioner={captioner}: unknown{nearest(captioner, captioning.CAPTIONERS)}; "
                f"known: {', '.join(captioning.CAPTIONERS)}"
            )
        self.source = source
        self.captioner = captioner

    def plan(self, store: Store) -> Iterable[Job]:
        group = layout.captions_group(self.source, self.captioner)
        revision = captioning.load(self.captioner).revision
        for commit in read_commits(store, layout.images_group(self.source)).values():
            inputs = {
                "stage": self.name,
                "version": VERSION,
                "captioner": self.captioner,
                "revision": revision,
                "images": commit.fingerprint,
            }
            yield Job(InputShard(commit.shard, commit.split), {group: inputs})

    def open(self, store: Store) -> Callable[[Job], dict[str, Commit]]:
        captioner = captioning.load(self.captioner)
        images = layout.images_group(self.source)

        def work(job: Job) -> dict[str, Commit]:
            keys, pictures, rejects = [], [], []
            for image in read_images(store, images, job.shard.id):
                try:
                    pictures.append(decode(image.data))
                    keys.append(image.key)
                except BadPicture as error:
                    rejects.append(Reject(image.key, self.name, error.reason, str(error)))
            captions = captioner(pictures)
            rows = []
            for key, caption in zip(keys, captions, strict=True):
                row = asdict(caption)
                rows.append({"key": key, "caption": row.pop("text"), **row})
            data = to_parquet(pa.Table.from_pylist(rows, schema=_SCHEMA))
            return {
                group: write_shard(
                    store,
                    group,
                    job.shard,
                    inputs,
                    files={f"{job.shard.id}.parquet": data},
                    keys=keys,
                    rejects=rejects,
                )
                for group, inputs in job.groups.items()
            }

        return work

    def manifest(self, group: str) -> None:
        return None


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

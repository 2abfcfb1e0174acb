"""`pipeline run download`: a source's pictures and captions to tars and parquets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from pydantic import BaseModel

from pipeline.core import layout
from pipeline.core.commits import Commit
from pipeline.core.images import BadPicture, decode
from pipeline.core.samples import ImageSample, InputShard, Reject
from pipeline.core.store import Store
from pipeline.stages import Job
from pipeline.stages.images import write_images

VERSION = 1  # bump when the bytes this stage writes change


class Source(Protocol):
    """What a source has to offer; its settings are its pydantic fields."""

    def shards(self) -> list[InputShard]: ...
    def fetch(self, shard: InputShard) -> Iterator[ImageSample | Reject]: ...
    def model_dump(self) -> dict[str, Any]: ...


class Download:
    name = "download"

    def __init__(self, source: str, settings: Source) -> None:
        self.source = source
        self.settings = settings

    def plan(self, store: Store) -> Iterable[Job]:
        group = layout.images_group(self.source)
        for shard in self.settings.shards():
            yield Job(shard, {group: self._inputs(shard)})

    def open(self, store: Store) -> Callable[[Job], dict[str, Commit]]:
        def work(job: Job) -> dict[str, Commit]:
            started = time.time()
            samples: list[ImageSample] = []
            rejects: list[Reject] = []
            for item in self.settings.fetch(job.shard):
                if isinstance(item, ImageSample):
                    item = checked(item)
                (samples if isinstance(item, ImageSample) else rejects).append(item)  # pyright: ignore
            return {
                group: write_images(store, group, job.shard, inputs, samples, rejects, started)
                for group, inputs in job.groups.items()
            }

        return work

    def manifest(self, group: str) -> None:
        return None

    def _inputs(self, shard: InputShard) -> dict[str, Any]:
        settings = self.settings
        config = settings.model_dump() if isinstance(settings, BaseModel) else {}
        return {
            "stage": self.name,
            "version": VERSION,
            "source": self.source,
            "settings": config,
            "shard": [shard.id, shard.split, list(shard.spec)],
        }


def checked(sample: ImageSample) -> ImageSample | Reject:
    """The sample, or a reject if its bytes are no picture: found here, not days later in encode."""
    try:
        decode(sample.data)
    except BadPicture as error:
        return Reject(sample.ref.key, Download.name, error.reason, str(error))
    return sample

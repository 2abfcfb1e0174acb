"""`pipeline run download`: a source's pictures and captions to tars and parquets."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from pipeline.core import drops, layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import MAX_REJECT_RATE, Commit, read_commit
from pipeline.core.images import BadPicture, decode
from pipeline.core.samples import ImageSample, InputShard, Reject
from pipeline.core.store import Store, canonical_json
from pipeline.stages import Job, Needs
from pipeline.stages.images import stored_samples, write_images

VERSION = 2  # bump when the bytes this stage writes change


class Source(Protocol):
    """What a source has to offer; its settings are its pydantic fields."""

    def shards(self) -> list[InputShard]:
        """What there is, in a fixed order."""
        ...

    def fetch(self, shard: InputShard) -> Iterator[ImageSample | Reject]:
        """A shard's pictures, in order."""
        ...

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the bytes of a given shard: not those that only enumerate."""
        ...

    def estimate(self, shard: InputShard) -> int:
        """Bytes of the shard's tar, roughly."""
        ...


class Download:
    name = "download"
    needs = Needs()

    def __init__(
        self, source: str, settings: Source, max_reject_rate: float = MAX_REJECT_RATE
    ) -> None:
        self.source = source
        self.settings = settings
        self.max_reject_rate = max_reject_rate

    def groups(self) -> list[str]:
        return [layout.images_group(self.source)]

    def plan(self, catalog: Catalog) -> Iterable[Job]:
        (group,) = self.groups()
        dropped = catalog.dropped(self.source)
        common = {
            "stage": self.name,
            "version": VERSION,
            "source": self.source,
            "settings": self.settings.decisive(),
        }
        for shard in self.settings.shards():
            keys = dropped.get(shard.id, frozenset())
            # As a commit record gives it back: lists, not tuples, so that the two can be compared.
            own = {"shard": json.loads(canonical_json([shard.id, shard.split, shard.spec]))}
            yield Job(shard, {group: {**common, **own, **drops.inputs(keys)}}, keys)

    def estimate(self, job: Job, group: str) -> int:
        return self.settings.estimate(job.shard)

    def open(self, store: Store) -> _Worker:
        return _Worker(self, store)

    def manifest(self, group: str) -> None:
        return None


class _Worker:
    def __init__(self, stage: Download, store: Store) -> None:
        self.stage = stage
        self.store = store
        self.counters: Counter[str] = Counter()

    def take_counters(self) -> Counter[str]:
        taken, self.counters = self.counters, Counter()
        return taken

    def __call__(self, job: Job) -> dict[str, Commit]:
        return {group: self._make(job, group) for group in job.groups}

    def _make(self, job: Job, group: str) -> Commit:
        started = time.time()
        inputs = job.groups[group]
        samples: list[ImageSample] = []
        rejects: list[Reject] = []
        for item in self._items(job, group):
            if isinstance(item, ImageSample):
                if item.ref.key in job.dropped:
                    continue
                item = checked(item)
            (samples if isinstance(item, ImageSample) else rejects).append(item)  # pyright: ignore
        return write_images(
            self.store,
            group,
            job.shard,
            inputs,
            samples,
            rejects,
            started,
            self.stage.max_reject_rate,
        )

    def _items(self, job: Job, group: str) -> Iterable[ImageSample | Reject]:
        """From the source, or, where only drops have changed since, from the tar that is there:
        a takedown must not cost the shard's other pictures, whose links may be dead by now."""
        commit = read_commit(self.store, group, job.shard.id)
        if commit is not None and job.dropped:
            wanted, had = dict(job.groups[group]), dict(commit.inputs)
            if wanted.pop("dropped") != had.pop("dropped", None) and wanted == had:
                self.counters["shards rewritten without dropped samples"] += 1
                return stored_samples(self.store, group, commit)
        self.counters["shards fetched"] += 1
        return self.stage.settings.fetch(job.shard)


def checked(sample: ImageSample) -> ImageSample | Reject:
    """The sample, or a reject if its bytes are no picture: found here, not days later in encode."""
    try:
        decode(sample.data)
    except BadPicture as error:
        return Reject(sample.ref.key, Download.name, error.reason, str(error))
    return sample

"""`pipeline run download`: a source's pictures and captions to tars and parquets."""

from __future__ import annotations

import heapq
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from pipeline.core import drops, layout
from pipeline.core.advance import advance
from pipeline.core.catalog import Catalog
from pipeline.core.commits import MAX_REJECT_RATE, Commit, read_commit
from pipeline.core.rules import Rules, keep
from pipeline.core.samples import FAILED, ImageSample, InputShard, RawImage, Reject
from pipeline.core.store import Store, canonical_json, fingerprint
from pipeline.sources.files import transfer
from pipeline.stages import Job, Needs
from pipeline.stages.images import stored_rejects, stored_samples, write_images

VERSION = 3  # bump when the bytes this stage writes change


class Source(Protocol):
    """What a source has to offer; its settings are its pydantic fields."""

    rules: ClassVar[Rules]  # its defaults of what every picture has to meet

    def shards(self) -> list[InputShard]:
        """What there is, in a fixed order."""
        ...

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        """A shard's pictures, or of them `only` those with these keys, in order of key.

        One that cannot be had is a Reject; an archive that cannot be had whole is an exception.
        """
        ...

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the bytes of a given shard: not those that only enumerate."""
        ...

    def estimate(self, shard: InputShard) -> int:
        """Bytes of the shard's tar, roughly."""
        ...

    def samples(self, shard: InputShard) -> int:
        """Pictures in the shard, about."""
        ...


@runtime_checkable
class KeepsLists(Protocol):
    """A source whose lists are too long for specs: it keeps their rows under the root."""

    def attach(self, store: Store, folder: str) -> None:
        """Says where, in the process that plans and in each worker, before anything else."""
        ...


class Download:
    name = "download"
    needs = Needs()

    def __init__(
        self,
        source: str,
        settings: Source,
        max_reject_rate: float = MAX_REJECT_RATE,
        rules: Rules | None = None,
        retry_failed: bool = False,
    ) -> None:
        """
        Args:
            rules: what pictures have to meet; None is the source's defaults.
            retry_failed: of a shard that is there, fetch only what failed to download.
        """
        self.source = source
        self.settings = settings
        self.max_reject_rate = max_reject_rate
        self.rules = rules or settings.rules
        self.retry_failed = retry_failed

    def groups(self) -> list[str]:
        return [layout.images_group(self.source)]

    def plan(self, catalog: Catalog) -> Iterable[Job]:
        self._attach(catalog.store)
        (group,) = self.groups()
        dropped = catalog.dropped(self.source)
        common = {
            "stage": self.name,
            "version": VERSION,
            "source": self.source,
            "settings": self.settings.decisive(),
            "rules": self.rules.model_dump(),
        }
        for shard in self.settings.shards():
            keys = dropped.get(shard.id, frozenset())
            # As a commit record gives it back: lists, not tuples, so that the two can be compared.
            own = {"shard": json.loads(canonical_json([shard.id, shard.split, shard.spec]))}
            inputs = {group: {**common, **own, **drops.inputs(keys)}}
            yield Job(shard, inputs, keys, self.settings.samples(shard))

    def estimate(self, job: Job, group: str) -> int:
        return self.settings.estimate(job.shard)

    def open(self, store: Store) -> _Worker:
        self._attach(store)
        return _Worker(self, store)

    def manifest(self, group: str) -> None:
        return None

    def _attach(self, store: Store) -> None:
        if isinstance(self.settings, KeepsLists):
            self.settings.attach(store, layout.lists_folder(self.source))


class _Worker:
    def __init__(self, stage: Download, store: Store) -> None:
        self.stage = stage
        self.store = store
        self.counters: Counter[str] = Counter()

    def take_counters(self) -> Counter[str]:
        taken, self.counters = self.counters, Counter()
        return taken + transfer.take_counters()

    def __call__(self, job: Job) -> dict[str, Commit]:
        return {group: self._make(job, group) for group in job.groups}

    def _make(self, job: Job, group: str) -> Commit:
        started = time.time()
        return write_images(
            self.store,
            group,
            job.shard,
            job.groups[group],
            self._stored(job, group),
            started,
            self.stage.max_reject_rate,
        )

    def _stored(self, job: Job, group: str) -> Iterator[ImageSample | Reject]:
        """What the shard is to hold, in order of key, one picture at a time."""
        rules = self.stage.rules
        seen: dict[str, str] = {}  # hash -> key
        for item in self._items(job, group):
            advance(job.shard.id)
            key = item.key if isinstance(item, Reject) else item.ref.key
            if key in job.dropped:
                continue
            if isinstance(item, RawImage):
                item = keep(item, rules)
                if isinstance(item, ImageSample) and rules.clean_captions:
                    item = _cleaned(item)
            if isinstance(item, ImageSample) and rules.drop_duplicates:
                first = seen.setdefault(item.sha256, key)
                if first != key:
                    detail = f"the same picture as {first}"
                    item = Reject(key, Download.name, "duplicate", detail, item.ref)
            yield item

    def _items(self, job: Job, group: str) -> Iterable[RawImage | ImageSample | Reject]:
        """From the source; or from the tar that is there, where only drops have changed since (a
        takedown must not cost the shard's other pictures, whose links may be dead by now) or where
        only what failed is wanted."""
        commit = read_commit(self.store, group, job.shard.id)
        if commit is not None and job.dropped and _only_drops_differ(commit, job.groups[group]):
            self.counters["shards rewritten without dropped samples"] += 1
            stored = stored_samples(self.store, group, commit)
            return heapq.merge(stored, stored_rejects(self.store, group, commit), key=_key)
        if (
            commit is not None
            and self.stage.retry_failed
            and commit.fingerprint == fingerprint(job.groups[group])
        ):
            return self._retried(job.shard, group, commit)
        self.counters["shards fetched"] += 1
        return self.stage.settings.fetch(job.shard)

    def _retried(
        self, shard: InputShard, group: str, commit: Commit
    ) -> Iterator[RawImage | ImageSample | Reject]:
        """The shard with what failed to download fetched again: as if it had come at first."""
        rejects = stored_rejects(self.store, group, commit)
        failed = frozenset(reject.key for reject in rejects if reject.reason == FAILED)
        others = [reject for reject in rejects if reject.reason != FAILED]
        self.counters["samples tried again"] += len(failed)
        stored = stored_samples(self.store, group, commit)
        return heapq.merge(stored, others, self.stage.settings.fetch(shard, failed), key=_key)


def _key(item: RawImage | ImageSample | Reject) -> str:
    return item.key if isinstance(item, Reject) else item.ref.key


def _only_drops_differ(commit: Commit, inputs: dict[str, Any]) -> bool:
    wanted, had = dict(inputs), dict(commit.inputs)
    return wanted.pop("dropped", None) != had.pop("dropped", None) and wanted == had


def _cleaned(sample: ImageSample) -> ImageSample | Reject:
    """With its captions cleaned; a caption of which nothing is left is none."""
    from captioning.clean import clean

    ref = sample.ref
    caption = clean(ref.caption)
    if ref.caption and not caption:
        detail = f"nothing is left of {ref.caption[:80]!r}"
        return Reject(ref.key, Download.name, "no-caption", detail, ref)
    references = tuple(map(clean, ref.references))
    return replace(sample, ref=replace(ref, caption=caption, references=references))

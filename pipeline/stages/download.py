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
from pipeline.core.catalog import Catalog, Head
from pipeline.core.commits import MAX_REJECT_RATE, Commit, read_commit
from pipeline.core.errors import BadPicture
from pipeline.core.images import once_misread, read_header
from pipeline.core.mends import MENDS, METADATA
from pipeline.core.rules import KEPT, Rules, keep, without_metadata
from pipeline.core.samples import FAILED, ImageSample, InputShard, RawImage, Reject
from pipeline.core.stage import Job, Needs
from pipeline.core.store import Store, canonical_json, fingerprint
from pipeline.sources.files import resumable
from pipeline.stages.images import stored_rejects, stored_samples, write_images
from pipeline.stages.looks import Raw, findings, misread

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
class AtHand(Protocol):
    """A source whose own files may be on this machine, so that they can be looked at again."""

    def at_hand(self) -> bool: ...


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
        shards = self.settings.shards()
        mended = catalog.mended(group, findings(catalog, group, self._raw(shards)))
        heads = catalog.heads(group)
        common = {
            "stage": self.name,
            "version": VERSION,
            "source": self.source,
            "settings": self.settings.decisive(),
        }
        for shard in shards:
            keys = dropped.get(shard.id, frozenset())
            # As a commit record gives it back: lists, not tuples, so that the two can be compared.
            own = {"shard": json.loads(canonical_json([shard.id, shard.split, shard.spec]))}
            own["rules"] = self._decisive_rules(heads.get(shard.id))
            inputs = {**common, **own, **drops.inputs(keys)}
            kinds = mended.get(shard.id, [])
            if self.rules.metadata == "keep":
                kinds = [kind for kind in kinds if kind != METADATA]
            if kinds:
                inputs["mended"] = kinds
            yield Job(shard, {group: inputs}, keys, self.settings.samples(shard))

    def _decisive_rules(self, head: Head | None) -> dict[str, Any]:
        """Every rule, as a commit has it; `metadata`, which came later, where it is not the
        default. A shard from before it kept all metadata, so to keep it makes nothing stale."""
        rules = self.rules.model_dump()
        if rules["metadata"] == "strip" or (head is not None and head.mends < MENDS):
            del rules["metadata"]
        return rules

    def _raw(self, shards: list[InputShard]) -> Raw | None:
        """Which pictures the first version read wrongly before it shrank or converted them, by
        the source's own files; None where they are not at hand."""
        if not (isinstance(self.settings, AtHand) and self.settings.at_hand()):
            return None
        by_id = {shard.id: shard for shard in shards}

        def misread(commit: Commit) -> set[str]:
            shard = by_id.get(commit.shard)
            if (
                shard is None
                or json.loads(canonical_json([shard.id, shard.split, shard.spec]))
                != (commit.inputs["shard"])
            ):
                return set()  # it is stale in any case
            return {
                item.ref.key
                for item in self.settings.fetch(shard)
                if isinstance(item, RawImage)
                and once_misread(item.data)
                and not _stays(item.data, self.rules)
            }

        return misread

    def estimate(self, job: Job, group: str) -> int:
        return self.settings.estimate(job.shard)

    def open(self, store: Store) -> _Worker:
        self._attach(store)
        return _Worker(self, store)

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
        return taken + resumable.take_counters()

    def __call__(self, job: Job) -> dict[str, Commit]:
        return {group: self._make(job, group) for group in job.groups}

    def _make(self, job: Job, group: str) -> Commit:
        started = time.time()
        commit = read_commit(self.store, group, job.shard.id)
        stored = None if commit is None else self._rewritten(job, group, commit)
        reads_as = ""
        if commit is not None and stored is not None:
            self.counters["shards rewritten from what is stored"] += 1
            if commit.inputs.get("dropped") == job.groups[group].get("dropped"):
                reads_as = commit.content()  # the same pictures, less what lay beside them
        return write_images(
            self.store,
            group,
            job.shard,
            job.groups[group],
            self._stored(job, group, commit) if stored is None else stored,
            started,
            self.stage.max_reject_rate,
            reads_as,
        )

    def _rewritten(
        self, job: Job, group: str, commit: Commit
    ) -> Iterator[ImageSample | Reject] | None:
        """The shard out of the tar that is there, where only samples were dropped since, or
        metadata is to go: neither must cost its other pictures, whose links may be dead by now."""
        if commit.fingerprint == fingerprint(job.groups[group]):
            return None
        if not _only_less(commit, job.groups[group]):
            return None
        stored = stored_samples(self.store, group, commit)
        if self.stage.rules.metadata == "strip":
            stored = map(without_metadata, stored)
        items = heapq.merge(stored, stored_rejects(self.store, group, commit), key=_key)
        return (item for item in items if _key(item) not in job.dropped)

    def _stored(
        self, job: Job, group: str, commit: Commit | None
    ) -> Iterator[ImageSample | Reject]:
        """What the shard is to hold, in order of key, one picture at a time."""
        rules = self.stage.rules
        seen: dict[str, str] = {}  # hash -> key
        for item in self._items(job, group, commit):
            advance(job.shard.id)
            key = _key(item)
            if key in job.dropped:
                continue
            if isinstance(item, RawImage):
                item = keep(item, rules)
                if isinstance(item, ImageSample) and item.profile:
                    self.counters[item.profile] += 1
                if isinstance(item, ImageSample) and rules.clean_captions:
                    item = _cleaned(item)
            if isinstance(item, ImageSample) and rules.drop_duplicates:
                first = seen.setdefault(item.sha256, key)
                if first != key:
                    detail = f"the same picture as {first}"
                    item = Reject(key, Download.name, "duplicate", detail, item.ref)
            yield item

    def _items(
        self, job: Job, group: str, commit: Commit | None
    ) -> Iterable[RawImage | ImageSample | Reject]:
        """From the source; or of a shard that is there only what failed, or was read wrongly."""
        if commit is not None and commit.fingerprint == fingerprint(job.groups[group]):
            if self.stage.retry_failed:
                return self._retried(job.shard, group, commit)
        elif commit is not None and _only_mended(commit, job.groups[group]):
            return self._reread(job.shard, group, commit)
        self.counters["shards fetched"] += 1
        return self.stage.settings.fetch(job.shard)

    def _reread(
        self, shard: InputShard, group: str, commit: Commit
    ) -> Iterator[RawImage | ImageSample | Reject]:
        """The shard with what an earlier version read wrongly fetched again, and the duplicates
        that such pictures seemed to have; all else from the tar."""
        raw = self.stage._raw([shard])
        wrong = set() if raw is None else raw(commit)
        wrong |= {s.ref.key for s in stored_samples(self.store, group, commit) if misread(s)}
        rejects = stored_rejects(self.store, group, commit)
        again = wrong | {r.key for r in rejects if r.reason == "duplicate"}
        self.counters["pictures read again"] += len(again)
        stored = (s for s in stored_samples(self.store, group, commit) if s.ref.key not in wrong)
        if self.stage.rules.metadata == "strip":
            stored = map(without_metadata, stored)
        others = [reject for reject in rejects if reject.key not in again]
        fetched = self.stage.settings.fetch(shard, frozenset(again))
        return heapq.merge(stored, others, fetched, key=_key)

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


def _only_less(commit: Commit, inputs: dict[str, Any]) -> bool:
    """Whether a shard is to be what it is, without some pictures or without metadata."""
    return _only_mended(commit, inputs) and _kinds(inputs) - _kinds(commit.inputs) <= {METADATA}


def _only_mended(commit: Commit, inputs: dict[str, Any]) -> bool:
    """Whether dropped samples, metadata that is to go, and mends are all that differs."""
    wanted, had = ({k: v for k, v in i.items() if k not in _LESS} for i in (inputs, commit.inputs))
    if "dropped" in commit.inputs and "dropped" not in inputs:
        return False  # what was dropped is to come back
    rules = dict(had.get("rules", {}))
    if "metadata" not in wanted.get("rules", {}):
        rules.pop("metadata", None)
    return wanted == {**had, "rules": rules}


_LESS = ("dropped", "mended")


def _kinds(inputs: dict[str, Any]) -> set[str]:
    return set(inputs.get("mended", ()))


def _stays(data: bytes, rules: Rules) -> bool:
    """Whether a picture is stored as it came: what is wrong in it is wrong where it is read."""
    try:
        header = read_header(data)
    except BadPicture:
        return True
    shrunk = rules.image_size is not None and header.shorter > rules.image_size
    return header.format in KEPT and not header.animated and not shrunk


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

"""`pipeline run caption`: a captioner's sentences beside the downloaded shards, tars untouched."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

import captioning
from pipeline.core import drops, images, layout
from pipeline.core.advance import advance
from pipeline.core.catalog import Catalog
from pipeline.core.commits import MAX_REJECT_RATE, Commit, plain_stem, read_file, write_shard
from pipeline.core.errors import SettingError, nearest
from pipeline.core.samples import InputShard, Reject
from pipeline.core.stage import Job, Needs
from pipeline.core.stopwatch import Stopwatch
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet, to_parquet
from pipeline.stages.caption_text import Refused, finish, parse_steps, summarise
from pipeline.stages.images import images_commit, placed, read_images
from pipeline.stages.looks import findings

VERSION = 4  # bump when the bytes this stage writes change
BYTES_A_CAPTION = 400  # in the parquet, at most, of a long one
THREADS = 1  # of torch in a worker on CPUs: part of what decides a text
GPU_CPUS = 4  # beside a GPU: two threads open pictures, one feeds the model
SPLIT = "split, out of memory"  # a counter of captioners: such a shard may differ in rounding


class CaptionStage:
    """
    Args:
        captioner: a name of captioning.CAPTIONERS, a folder or a hub id.
        settings: what its own `Settings` take; None values are those that were not given.
        clean: steps of pipeline.stages.caption_text, "habits,lower" or a list.
    """

    name = "caption"

    def __init__(
        self,
        source: str,
        captioner: str,
        max_reject_rate: float = MAX_REJECT_RATE,
        settings: dict[str, Any] | None = None,
        clean: str | list[str] | tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.max_reject_rate = max_reject_rate
        self.steps = parse_steps(clean)
        with one_line_errors():
            self.captioner = captioning.load(captioner, **own_settings(captioner, settings or {}))
        gpus = self.captioner.gpus
        self.needs = Needs(GPU_CPUS, gpus) if gpus else Needs(workers=self.captioner.workers)
        self.label = ".".join(filter(None, [self.captioner.label(), "+".join(self.steps)]))

    def groups(self) -> list[str]:
        return [layout.captions_group(self.source, self.label)]

    def plan(self, catalog: Catalog) -> Iterable[Job]:
        (group,) = self.groups()
        with one_line_errors():
            common: dict[str, Any] = {
                "stage": self.name,
                "version": VERSION,
                "captioner": self.captioner.name,
                "revision": self.captioner.revision,
                **self.captioner.decisive(),
            }
        if self.steps:
            common["clean"] = list(self.steps)
        dropped = catalog.dropped(self.source)
        mended = catalog.mended(group, findings(catalog, group))
        for shard, head in catalog.heads(layout.images_group(self.source)).items():
            keys = dropped.get(shard, frozenset())
            inputs = {**common, "images": head.content, **drops.inputs(keys)}
            if kinds := mended.get(shard):
                inputs["mended"] = kinds
            yield Job(InputShard(shard, head.split), {group: inputs}, keys, head.samples)

    def estimate(self, job: Job, group: str) -> int:
        number = job.groups[group].get("num_captions", 1)
        return job.samples * number * BYTES_A_CAPTION

    def open(self, store: Store) -> CaptionWorker:
        return CaptionWorker(self, store)

    def page(self, store: Store, counters: Counter[str], seconds: float) -> str:
        """HTML that shows some pictures with their captions, and what the run counted."""
        from pipeline.stages.caption_page import page

        return page(store, self.source, self.groups()[0], self.label, counters, seconds)


class CaptionWorker:
    """Captions one shard after another; the captioner loads its weights with the first."""

    def __init__(self, stage: CaptionStage, store: Store) -> None:
        self.stage = stage
        self.store = store
        self.captioner = stage.captioner
        self.counters: Counter[str] = Counter()
        self.watch = Stopwatch()

    def take_counters(self) -> Counter[str]:
        taken, self.counters = self.counters, Counter()
        own, self.captioner.counters = self.captioner.counters, Counter()
        return taken + own + self.watch.take()

    def __call__(self, job: Job) -> dict[str, Commit]:
        return {group: self._make(job, group) for group in job.groups}

    def _make(self, job: Job, group: str) -> Commit:
        stage = self.stage
        order: dict[str, int] = {}  # key -> its place in the tar
        made: dict[str, list[captioning.Caption]] = {}
        rejects: list[Reject] = []
        counts: Counter[str] = Counter()
        split = self.captioner.counters[SPLIT]
        with one_line_errors():
            for key, answer in self.captioner.caption(self._pictures(job, group, order)):
                advance(job.shard.id)
                if not isinstance(answer, captioning.Failure):
                    answer = finish(answer, stage.steps, counts)
                if isinstance(answer, (captioning.Failure, Refused)):
                    rejects.append(Reject(key, stage.name, answer.reason, answer.detail))
                else:
                    made[key] = answer
        if self.captioner.counters[SPLIT] > split:
            counts[SPLIT] = self.captioner.counters[SPLIT] - split
        if lost := order.keys() - made.keys() - {reject.key for reject in rejects}:
            raise RuntimeError(
                f"{stage.captioner.name} lost {len(lost)} pictures, e.g. {min(lost)}"
            )
        if rejects:
            rejects.sort(key=lambda reject: order[reject.key])
            pictures = layout.images_group(stage.source)
            found = images_commit(self.store, pictures, job.shard.id, job.groups[group]["images"])
            rejects = placed(self.store, pictures, found, rejects)
        keys = sorted(made, key=order.__getitem__)
        counts += summarise(caption for key in keys for caption in made[key])
        self.counters += counts - Counter({SPLIT: counts[SPLIT]})  # the captioner tells of that
        with self.watch("write"):
            table = pa.Table.from_pylist(
                [_row(key, caption) for key in keys for caption in made[key]], schema=_SCHEMA
            )
            files = {".parquet": to_parquet(table)}
            stem = plain_stem(self.store, group, job.shard.id, files)
            return write_shard(
                self.store,
                group,
                job.shard,
                job.groups[group],
                files={stem + ending: data for ending, data in files.items()},
                keys=keys,
                rejects=rejects,
                counters=dict(sorted(counts.items())),
                max_reject_rate=stage.max_reject_rate,
            )

    def _pictures(
        self, job: Job, group: str, order: dict[str, int]
    ) -> Iterator[captioning.Picture]:
        """The shard's pictures, still encoded, as the captioner asks for them."""
        pictures = layout.images_group(self.stage.source)
        with self.watch("read"):
            commit = images_commit(self.store, pictures, job.shard.id, job.groups[group]["images"])
            table = from_parquet(read_file(self.store, pictures, commit, ".parquet"))
            columns = (table[name].to_pylist() for name in ("key", "width", "height"))
            sizes = {key: (w, h) for key, w, h in zip(*columns, strict=True) if w and h}
        for image in read_images(self.store, pictures, commit):
            if image.key not in job.dropped:
                order[image.key] = len(order)
                opened = functools.partial(_open, image.data)
                # A server may take no notice of a profile: it gets the pixels that we see.
                data = None if images.profile_changes(image.data) else image.data
                yield captioning.Picture(image.key, opened, data, sizes.get(image.key))


def check_captioner(name: str) -> None:
    """Raises SettingError where there is no captioner of this name."""
    with one_line_errors():
        captioning.find(name)


def own_settings(captioner: str, given: dict[str, Any]) -> dict[str, Any]:
    """A captioner's settings out of a YAML or flags, as the types that it declares.

    `device` says where models run, so one without a model takes no notice of it.

    Raises:
        SettingError: a name that it does not have, or a value of another type.
    """
    kinds = get_type_hints(captioning.find(captioner).Settings)
    found = {}
    for name, value in given.items():
        if value is None or (name == "device" and name not in kinds):
            continue
        if name not in kinds:
            known = [*kinds, "captioner", "clean"]
            raise SettingError(
                f"caption.{name}: no setting of captioner={captioner}{nearest(name, known)}; "
                f"known: {', '.join(kinds) or 'none'}"
            )
        try:
            found[name] = TypeAdapter(kinds[name]).validate_python(value)
        except ValidationError as error:
            raise SettingError(f"caption.{name}={value!r}: {error.errors()[0]['msg']}") from error
    if "threads" in kinds:
        found.setdefault("threads", THREADS)
    return found


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a captioner says of its settings, as the pipeline says it."""
    try:
        yield
    except captioning.BadSetting as error:
        raise SettingError(str(error)) from error


def _open(data: bytes) -> Any:
    try:
        return images.decode(data)
    except images.BadPicture as error:
        raise captioning.BadPicture(error.reason, str(error)) from error


def _row(key: str, caption: captioning.Caption) -> dict[str, Any]:
    row = dict(vars(caption))
    return {"key": key, "caption": row.pop("text"), **row}


_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("captioner", pa.string()),
        ("revision", pa.string()),
        ("prompt", pa.string()),
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("best_effort", pa.bool_()),
        ("number", pa.int32()),  # of the caption, where a picture has several
    ]
)

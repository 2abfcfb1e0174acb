"""`pipeline convert import`: an MDS dataset of the official code to column groups, no encoder run.

Each official shard is one input shard: its latents go to a group for each resolution, its captions
and token vectors to a text group of all rows. Which encoders made them is not in the dataset: the
user names them, and the sizes must agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core import drops, layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import MAX_REJECT_RATE, Commit, write_shard
from pipeline.core.errors import SettingError
from pipeline.core.mds import encode_shard
from pipeline.core.samples import InputShard, Reject
from pipeline.core.stage import Job, Needs
from pipeline.core.store import Store, fingerprint
from pipeline.core.tables import key_rows
from pipeline.encoders import text_facts, vae_facts
from pipeline.official import layout as official
from pipeline.official.dataset import read_index, read_rows

VERSION = 1  # bump when the bytes this stage writes change
CROP = "center"  # of the official precompute step
LATENTS = ("sample", "mean")


@dataclass(frozen=True)
class ImportSettings:
    """What to read, and what it is."""

    dataset: str  # folder or URL that holds index.json
    vae: str
    text_encoder: str
    captions: str = "alt"  # the name under which its captions stand
    resolutions: tuple[int, ...] = ()  # () is every one that it has
    split: str = "train"
    latents: str = "sample"  # of the posterior, which the official code stores; or "mean"

    def __post_init__(self) -> None:
        if self.latents not in LATENTS:
            raise SettingError(f"--latents {self.latents}: use {' or '.join(LATENTS)}")


class Import:
    name = "import"
    needs = Needs()

    def __init__(
        self, source: str, settings: ImportSettings, max_reject_rate: float = MAX_REJECT_RATE
    ) -> None:
        """Reads the dataset's index.

        Raises:
            SettingError: it is no MDS dataset of the official layout, or an encoder is unknown.
        """
        self.source = source
        self.settings = settings
        self.max_reject_rate = max_reject_rate
        unread = {"dtype": ""}  # what it computed in, nobody knows
        self.vae = vae_facts(settings.vae).model_copy(update=unread)
        self.text = text_facts(settings.text_encoder).model_copy(update=unread)
        entries = read_index(settings.dataset)
        there = official.resolutions_of(entries[0]["column_names"])
        self.resolutions = sorted(settings.resolutions or there)
        self.columns = official.columns(self.resolutions)
        if not there:
            self.columns[official.latents_column(256)] = "bytes"  # to be missed below
        for entry in entries:
            self._check_columns(entry)
        for resolution in self.resolutions:
            if resolution % self.vae.downsample:
                raise SettingError(
                    f"--vae {settings.vae}: {resolution} px is no multiple of its downsample, "
                    f"{self.vae.downsample}"
                )

    def groups(self) -> list[str]:
        return [*map(self.latents_group, self.resolutions), self.text_group()]

    def plan(self, catalog: Catalog) -> Iterable[Job]:
        entries = read_index(self.settings.dataset)
        digits = max(5, len(str(len(entries) - 1)))
        dropped = catalog.dropped(self.source)
        common = {"stage": self.name, "version": VERSION}
        vae, text = self.vae.model_dump(), self.text.model_dump()
        for number, entry in enumerate(entries):
            shard = InputShard(f"{number:0{digits}d}", self.settings.split, (entry,))
            keys = dropped.get(shard.id, frozenset())
            # Not where it lies: a dataset that was moved is the same.
            own = {**common, "official": fingerprint(entry), **drops.inputs(keys)}
            own["text_encoder"] = text  # its vectors decide which samples there are
            groups: dict[str, dict[str, Any]] = {
                self.latents_group(r): {
                    **own,
                    "vae": vae,
                    "resolution": r,
                    "latents": self.settings.latents,
                    **official.form(self.vae),
                }
                for r in self.resolutions
            }
            groups[self.text_group()] = {**own, "captions": self.settings.captions, "text": "full"}
            yield Job(shard, groups, keys, entry["samples"])

    def estimate(self, job: Job, group: str) -> int:
        resolution = job.groups[group].get("resolution")
        if resolution is None:
            return 2 * job.samples * self.text.length * self.text.width
        return 2 * job.samples * int(np.prod(self.latent_shape(resolution)))

    def open(self, store: Store) -> _Worker:
        return _Worker(self, store)

    def latents_group(self, resolution: int) -> str:
        s = self.settings
        return layout.latents_group(self.source, s.vae, resolution, s.latents, CROP)

    def text_group(self) -> str:
        s = self.settings
        return layout.text_group(self.source, s.text_encoder, s.captions, "full")

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        side = resolution // self.vae.downsample
        return self.vae.channels, side, side

    def _check_columns(self, entry: dict[str, Any]) -> None:
        encodings = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
        for name, encoding in self.columns.items():
            if encodings.get(name) != encoding:
                what = f"is {encodings[name]}" if name in encodings else "is missing"
                raise SettingError(
                    f"--from {self.settings.dataset}: column {name} ({encoding}) {what} in "
                    f"{entry['raw_data']['basename']}, which has {', '.join(sorted(encodings))}"
                )


class _Worker:
    def __init__(self, stage: Import, store: Store) -> None:
        self.stage = stage
        self.store = store
        self.dataset = Store(stage.settings.dataset)

    def take_counters(self) -> Counter[str]:
        return Counter()  # its commits say it all

    def __call__(self, job: Job) -> dict[str, Commit]:
        stage = self.stage
        (entry,) = job.shard.spec
        rows = list(read_rows(self.dataset, entry, stage.columns))
        digits = max(4, len(str(len(rows) - 1)))
        keyed = [(f"{job.shard.id}{number:0{digits}d}", row) for number, row in enumerate(rows)]
        keyed = [(key, row) for key, row in keyed if key not in job.dropped]
        self._check_sizes(rows)
        good, rejects = [], []
        for key, row in keyed:  # what has no vectors is of no use to any group
            bad = _unfit(key, row[official.TOKENS], (stage.text.length, stage.text.width))
            if bad:
                rejects.append(bad)
            else:
                good.append((key, row))
        made = {}
        for resolution in stage.resolutions:
            group = stage.latents_group(resolution)
            if group in job.groups:
                made[group] = self._latents(job, group, resolution, good, rejects)
        if stage.text_group() in job.groups:
            made[stage.text_group()] = self._text(job, good, rejects)
        return made

    def _check_sizes(self, rows: list[dict[str, Any]]) -> None:
        """Raises SettingError where all of a column fits other encoders than those named."""
        stage = self.stage
        for name, shape in [
            (official.TOKENS, (stage.text.length, stage.text.width)),
            *((official.latents_column(r), stage.latent_shape(r)) for r in stage.resolutions),
        ]:
            sizes = {len(row[name]) for row in rows}
            if len(sizes) == 1 and sizes != {2 * int(np.prod(shape))}:
                raise SettingError(_other_encoder(stage, name, sizes.pop(), shape))

    def _latents(
        self,
        job: Job,
        group: str,
        resolution: int,
        good: list[tuple[str, dict[str, Any]]],
        rejects: list[Reject],
    ) -> Commit:
        name, shape = official.latents_column(resolution), self.stage.latent_shape(resolution)
        samples, corrections, bad = [], [], list(rejects)
        for key, row in good:
            unfit = _unfit(key, row[name], shape)
            if unfit:
                bad.append(unfit)
                continue
            values = np.frombuffer(row[name], official.DTYPE).reshape(shape)
            raw, correction = official.from_official(values, self.stage.vae)
            if not np.isfinite(raw).all():
                detail = f"{official.DTYPE} cannot hold what it is without the VAE's scale"
                bad.append(Reject(key, Import.name, "non-finite", detail))
                continue
            samples.append({"key": key, "latent": raw})
            corrections.append(correction)
        sides = ",".join(map(str, shape))
        columns = {"key": "str", "latent": f"ndarray:{official.DTYPE}:{sides}"}
        keys = [sample["key"] for sample in samples]
        more = {official.CORRECTIONS: pa.array(corrections, pa.binary())}
        parquet = key_rows(keys, range(len(keys)), **more)
        return self._commit(job, group, columns, samples, keys, parquet, bad, {})

    def _text(
        self, job: Job, good: list[tuple[str, dict[str, Any]]], rejects: list[Reject]
    ) -> Commit:
        """Each distinct caption once; one that has several vectors (another batch may move the
        last bit) once for each, or the way back would not be exact."""
        stage = self.stage
        row_of: dict[tuple[str, bytes], int] = {}
        rows = [
            row_of.setdefault((row[official.CAPTION], row[official.TOKENS]), len(row_of))
            for _, row in good
        ]
        shape = (stage.text.length, stage.text.width)
        samples = [
            {"caption": c, "tokens": np.frombuffer(data, official.DTYPE).reshape(shape)}
            for c, data in row_of
        ]
        distinct = len({caption for caption, _ in row_of})
        counters = {
            "distinct_captions": distinct,
            "further_vectors_of_a_caption": len(row_of) - distinct,
        }
        keys = [key for key, _ in good]
        columns = {"caption": "str", "tokens": f"ndarray:{official.DTYPE}"}
        group, parquet = stage.text_group(), key_rows(keys, rows)
        return self._commit(job, group, columns, samples, keys, parquet, rejects, counters)

    def _commit(
        self,
        job: Job,
        group: str,
        columns: dict[str, str],
        samples: list[dict[str, Any]],
        keys: list[str],
        parquet: bytes,
        rejects: list[Reject],
        counters: dict[str, int],
    ) -> Commit:
        stem = f"{job.shard.id}-{fingerprint(job.groups[group])}"
        files, entry = {f"{stem}.parquet": parquet}, None
        if samples:
            files[f"{stem}.mds"], entry = encode_shard(columns, samples, f"{stem}.mds")
        return write_shard(
            self.store,
            group,
            job.shard,
            job.groups[group],
            files,
            keys,
            rejects,
            entry,
            counters,
            self.stage.max_reject_rate,
        )


def _unfit(key: str, data: bytes, shape: tuple[int, ...]) -> Reject | None:
    """Why these bytes are no array of finite values of this shape."""
    wanted = 2 * int(np.prod(shape))
    if len(data) != wanted:
        detail = f"{len(data)} bytes, {wanted} expected"
        return Reject(key, Import.name, "wrong-size", detail)
    if not np.isfinite(np.frombuffer(data, official.DTYPE)).all():
        return Reject(key, Import.name, "non-finite", "values that are no numbers")
    return None


def _other_encoder(stage: Import, column: str, size: int, shape: tuple[int, ...]) -> str:
    settings = stage.settings
    if column == official.TOKENS:
        option, channels = f"--text-encoder {settings.text_encoder}", ""
        kind = f"{stage.text.name} gives {shape[0]} tokens of width {shape[1]}"
    else:
        option, area = f"--vae {settings.vae}", 2 * shape[1] * shape[2]
        channels = "" if size % area else f", {size // area} channels"
        kind = f"{stage.vae.name} has {shape[0]} channels of {shape[1]}x{shape[2]}"
    return (
        f"{option}: {settings.dataset}: {column} holds {size} bytes a sample{channels}; {kind}, "
        f"{2 * int(np.prod(shape))} bytes; name what made it"
    )

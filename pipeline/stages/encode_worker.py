"""Makes the groups of one shard for pipeline.stages.encode: read, encode, commit."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipeline.core import layout
from pipeline.core.advance import advance
from pipeline.core.commits import Commit, read_file, write_shard
from pipeline.core.mds import encode_shard, stored
from pipeline.core.samples import Reject
from pipeline.core.stage import Job
from pipeline.core.stopwatch import Stopwatch
from pipeline.core.store import Store, fingerprint
from pipeline.core.tables import key_rows
from pipeline.core.tars import read_samples
from pipeline.stages.captions import chosen_captions
from pipeline.stages.encode_settings import Outputs
from pipeline.stages.images import StoredImage, images_commit, placed, stored_image
from pipeline.stages.latents import LatentMaker
from pipeline.stages.latents import Made as MadeLatents
from pipeline.stages.text import TextMaker, columns


class EncodeWorker:
    """Makes the wanted groups of a shard; weights are loaded on first use. Threads may share it.

    Args:
        threads: that decode beside the encoder; 0 does it in between, on the encoder's core.
    """

    def __init__(self, stage: Outputs, store: Store, threads: int = 0) -> None:
        self.stage = stage
        self.settings = stage.settings
        self.store = store
        self.watch = Stopwatch()
        self.latents = LatentMaker(lambda: self.vae, threads, self.watch)
        self.text = TextMaker(lambda: self.text_encoder, self.settings.batch(), self.watch)
        self._loaded: Counter[str] = Counter()

    def take_counters(self) -> Counter[str]:
        taken, self._loaded = self._loaded, Counter()
        return taken + self.watch.take()

    def __call__(self, job: Job) -> dict[str, Commit]:
        wanted = {
            self.stage.latents_group(r): r
            for r in self.settings.resolutions
            if self.stage.latents_group(r) in job.groups
        }
        images = layout.images_group(self.stage.source)
        content = next(iter(job.groups.values()))["images"]
        commit = images_commit(self.store, images, job.shard.id, content)
        made: dict[str, Commit] = {}
        if wanted:
            recipes = [self.stage.recipe(resolution) for resolution in wanted.values()]
            found = self.latents.make(self._pictures(job, images, commit), recipes)
            for (group, resolution), result in zip(wanted.items(), found, strict=True):
                result.rejects[:] = placed(self.store, images, commit, result.rejects)
                made[group] = self._commit_latents(job, group, resolution, result)
        if self.stage.text_group() in job.groups:
            made[self.stage.text_group()] = self._text(job, commit)
        return made

    @functools.cached_property
    def vae(self) -> Any:
        from pipeline.encoders.autoencoder import load_vae

        self._loaded[f"loaded vae {self.settings.vae}"] += 1
        vae = load_vae(self.settings.vae, self.settings.device, self.settings.compute_dtype())
        if self.settings.compile:
            vae.compile()
        return vae

    @functools.cached_property
    def text_encoder(self) -> Any:
        from pipeline.encoders import load_text

        self._loaded[f"loaded text encoder {self.settings.text_encoder}"] += 1
        return load_text(self.settings.text_encoder, self.settings.device)

    def _pictures(self, job: Job, images: str, commit: Commit) -> Iterator[StoredImage]:
        with self.watch("read"):
            tar = read_file(self.store, images, commit, ".tar")
        for key, fields in read_samples(tar):
            image = stored_image(key, fields)
            if image is not None and key not in job.dropped:
                yield image
                advance(job.shard.id)

    def _commit_latents(self, job: Job, group: str, resolution: int, made: MadeLatents) -> Commit:
        keys = [sample["key"] for sample in made.samples]
        return self._commit(
            job,
            group,
            self.stage.latents_columns(resolution),
            made.samples,
            dict(zip(keys, range(len(keys)), strict=True)),
            made.rejects,
            made.counters,
        )

    def _text(self, job: Job, commit: Commit) -> Commit:
        stage, settings, group = self.stage, self.settings, self.stage.text_group()
        by_key = chosen_captions(
            self.store,
            stage.source,
            stage.mix,
            settings.seed,
            commit,
            job.groups[group]["captions_made"],
        )
        by_key = {key: caption for key, caption in by_key.items() if key not in job.dropped}
        rejects = [
            Reject(key, stage.name, "no-caption", f"{settings.captions} has no caption for it")
            for key, caption in by_key.items()
            if not caption
        ]
        rejects = placed(self.store, layout.images_group(stage.source), commit, rejects)
        by_key = {key: caption for key, caption in by_key.items() if caption}
        distinct = sorted(set(by_key.values()))
        with self.latents.encoder_turn:
            made = self.text.make(distinct, settings.text, settings.text_dtype)
        row_of = {caption: row for row, caption in enumerate(distinct)}
        rows = {key: row_of[caption] for key, caption in by_key.items()}
        kinds = columns(settings.text_dtype)
        return self._commit(job, group, kinds, made.samples, rows, rejects, made.counters)

    def _commit(
        self,
        job: Job,
        group: str,
        kinds: dict[str, str],
        samples: list[dict[str, Any]],
        rows: dict[str, int],
        rejects: list[Reject],
        counters: Counter[str],
    ) -> Commit:
        """An MDS file of the samples, where there are any, and a parquet of key -> row."""
        inputs = job.groups[group]
        stem = f"{job.shard.id}-{fingerprint(inputs)}"
        files: dict[str, bytes] = {}
        entry = None
        with self.watch("write"):
            if samples:
                hashes, compression = self.settings.hashes, self.settings.compression
                data, entry = encode_shard(kinds, samples, f"{stem}.mds", hashes, compression)
                files[stored(entry)["basename"]] = data
            files[f"{stem}.parquet"] = key_rows(rows, rows.values())
            return write_shard(
                self.store,
                group,
                job.shard,
                inputs,
                files,
                list(rows),
                rejects,
                entry,
                dict(counters),
                self.stage.max_reject_rate,
            )

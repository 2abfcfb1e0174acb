"""`pipeline run encode`: pictures and captions to latents and token vectors, in MDS column groups.

Each output group (latents by VAE and resolution, text by encoder and captions) has its own commits,
so a worker makes only the groups that are wanted and loads only the encoders they need.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core import drops, layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import MAX_REJECT_RATE, Commit, write_shard
from pipeline.core.errors import SettingError
from pipeline.core.images import BadPicture, decode, fit
from pipeline.core.manifest import LatentsManifest, Manifest, TextManifest
from pipeline.core.mds import check_options, encode_shard, stored
from pipeline.core.samples import InputShard, Reject
from pipeline.core.store import Store, fingerprint
from pipeline.encoders import find_text, find_vae
from pipeline.stages import Job
from pipeline.stages.captions import Mix, chosen_captions, upstream
from pipeline.stages.images import images_commit, read_images

VERSION = 2  # bump when the bytes this stage writes change
CROP = "center"
DTYPE = "float16"  # of stored latents and token vectors
THREADS = 1  # torch threads a worker: part of what decides the last bit of a latent


@dataclass(frozen=True)
class EncodeSettings:
    """What to make. Defaults are the paper's."""

    vae: str = "sdxl"
    text_encoder: str = "dfn5b-h14"
    resolutions: tuple[int, ...] = (256, 512)
    captions: str = "alt"  # a captioner, or a mix "alt:0.9,colour:0.1"
    text: str = "full"  # or "trimmed": rows up to end-of-text only
    batch_size: int = 16
    seed: int = 0
    device: str = "cpu"  # or "cuda": each worker then holds one GPU
    hashes: tuple[str, ...] = ()  # in the MDS index, for readers that check; the commit has its own
    compression: str | None = None  # of MDS files: zstd takes 8 % off latents

    def __post_init__(self) -> None:
        if self.text not in ("full", "trimmed"):
            raise SettingError(f"text={self.text}: use full or trimmed")
        if self.device not in ("cpu", "cuda"):
            raise SettingError(f"device={self.device}: use cpu or cuda")
        if self.batch_size < 1:
            raise SettingError(f"batch_size={self.batch_size}: use 1 or more")
        try:
            check_options(self.hashes, self.compression)
        except ValueError as error:
            raise SettingError(str(error)) from error
        if not self.resolutions:
            raise SettingError("resolutions: name at least one, e.g. 256,512")


class Encode:
    name = "encode"

    def __init__(
        self, source: str, settings: EncodeSettings, max_reject_rate: float = MAX_REJECT_RATE
    ) -> None:
        self.source = source
        self.settings = settings
        self.max_reject_rate = max_reject_rate
        self.gpus = 1.0 if settings.device == "cuda" else 0.0
        self.mix = Mix.parse(settings.captions)
        self.vae, _ = find_vae(settings.vae)
        self.text, _ = find_text(settings.text_encoder)
        for resolution in settings.resolutions:
            if resolution <= 0 or resolution % self.vae.downsample:
                raise SettingError(
                    f"resolutions={resolution}: {settings.vae} needs a multiple of "
                    f"{self.vae.downsample}"
                )

    def groups(self) -> list[str]:
        return [*map(self._latents_group, self.settings.resolutions), self._text_group()]

    def plan(self, catalog: Catalog) -> Iterable[Job]:
        images = catalog.heads(layout.images_group(self.source))
        captions = upstream(catalog, self.source, self.mix, images)
        dropped = catalog.dropped(self.source)
        settings = self.settings
        common = {
            "stage": self.name,
            "version": VERSION,
            "dtype": DTYPE,
            "device": settings.device,
            "threads": THREADS,
            "batch_size": settings.batch_size,
        }
        if settings.hashes:
            common["hashes"] = list(settings.hashes)
        if settings.compression:
            common["compression"] = settings.compression
        vae, text = self.vae.model_dump(), self.text.model_dump()
        for shard, head in images.items():
            keys = dropped.get(shard, frozenset())
            own = {**common, "images": head.content, **drops.inputs(keys)}
            groups: dict[str, dict[str, Any]] = {}
            for resolution in settings.resolutions:
                groups[self._latents_group(resolution)] = {
                    **own,
                    "vae": vae,
                    "resolution": resolution,
                    "crop": CROP,
                    "latents": "mean",
                }
            if shard in captions:
                groups[self._text_group()] = {
                    **own,
                    "captions_made": captions[shard],
                    "text_encoder": text,
                    "captions": self.mix.weights,
                    "seed": settings.seed if len(self.mix.weights) > 1 else None,
                    "text": settings.text,
                }
            yield Job(InputShard(shard, head.split), groups, keys, head.samples)

    def estimate(self, job: Job, group: str) -> int:
        itemsize = np.dtype(DTYPE).itemsize
        inputs = job.groups[group]
        if "resolution" in inputs:
            side = inputs["resolution"] // self.vae.downsample
            return job.samples * self.vae.channels * side * side * itemsize
        return job.samples * self.text.length * self.text.width * itemsize

    def open(self, store: Store) -> _Worker:
        import torch

        torch.set_num_threads(THREADS)
        return _Worker(self, store)

    def manifest(self, group: str) -> Manifest:
        for resolution in self.settings.resolutions:
            if group == self._latents_group(resolution):
                return LatentsManifest(
                    source=self.source,
                    vae=self.vae,
                    resolution=resolution,
                    crop=CROP,
                    latents="mean",
                    dtype=DTYPE,
                )
        return TextManifest(
            source=self.source,
            text_encoder=self.text,
            text=self.settings.text,
            captions=self.settings.captions,
            dtype=DTYPE,
        )

    def _latents_group(self, resolution: int) -> str:
        return layout.latents_group(self.source, self.settings.vae, resolution)

    def _text_group(self) -> str:
        s = self.settings
        return layout.text_group(self.source, s.text_encoder, s.captions, s.text)


class _Worker:
    """Makes the wanted groups of one shard at a time; weights are loaded on first use."""

    def __init__(self, stage: Encode, store: Store) -> None:
        self.stage = stage
        self.settings = stage.settings
        self.store = store
        self.counters: Counter[str] = Counter()

    def __call__(self, job: Job) -> dict[str, Commit]:
        made: dict[str, Commit] = {}
        text_group = self.stage._text_group()
        latents = [g for g in job.groups if g != text_group]
        if latents:
            made |= self._latents(job, latents)
        if text_group in job.groups:
            made[text_group] = self._text(job, text_group)
        return made

    @functools.cached_property
    def _vae(self):
        from pipeline.encoders.autoencoder import load_vae

        self.counters[f"loaded vae {self.settings.vae}"] += 1
        return load_vae(self.settings.vae, self.settings.device)

    @functools.cached_property
    def _text_encoder(self):
        from pipeline.encoders.clip import load_text

        self.counters[f"loaded text encoder {self.settings.text_encoder}"] += 1
        return load_text(self.settings.text_encoder, self.settings.device)

    def _latents(self, job: Job, groups: list[str]) -> dict[str, Commit]:
        """Each picture is decoded once for all wanted resolutions."""
        wanted = {g: int(job.groups[g]["resolution"]) for g in groups}
        keys: dict[str, list[str]] = {g: [] for g in groups}
        pixels: dict[str, list[np.ndarray]] = {g: [] for g in groups}
        rejects: dict[str, list[Reject]] = {g: [] for g in groups}
        images = layout.images_group(self.stage.source)
        for image in read_images(self.store, images, self._images(job)):
            if image.key in job.dropped:
                continue
            try:
                picture = decode(image.data)
            except BadPicture as error:
                for group in groups:
                    rejects[group].append(self._reject(image.key, error))
                continue
            for group, resolution in wanted.items():
                try:
                    pixels[group].append(fit(picture, resolution, CROP))
                    keys[group].append(image.key)
                except BadPicture as error:
                    rejects[group].append(self._reject(image.key, error))
        made = {}
        for group in groups:
            samples = []
            for key, latent in zip(keys[group], self._encode(pixels[group]), strict=True):
                if np.isfinite(latent).all():
                    samples.append({"key": key, "latent": latent})
                else:
                    detail = f"{self.settings.vae} gave a latent that {DTYPE} cannot hold"
                    rejects[group].append(Reject(key, self.stage.name, "non-finite", detail))
            made[group] = self._commit_latents(job, group, wanted[group], samples, rejects[group])
        return made

    def _encode(self, pixels: list[np.ndarray]) -> list[np.ndarray]:
        """Fixed batches in the shard's order: a latent may depend on its batch in the last bit."""
        latents: list[np.ndarray] = []
        for start in range(0, len(pixels), self.settings.batch_size):
            batch = np.stack(pixels[start : start + self.settings.batch_size])
            latents += list(self._vae.encode(batch).numpy().astype(DTYPE))
        return latents

    def _commit_latents(
        self,
        job: Job,
        group: str,
        resolution: int,
        samples: list[dict[str, Any]],
        rejects: list[Reject],
    ) -> Commit:
        vae = self.stage.vae
        side = resolution // vae.downsample
        columns = {"key": "str", "latent": f"ndarray:{DTYPE}:{vae.channels},{side},{side}"}
        files, entry = self._mds_file(job, group, columns, samples)
        keys = [sample["key"] for sample in samples]
        files[keys_name(job.shard.id, job.groups[group])] = _keys_table(keys, range(len(keys)))
        return write_shard(
            self.store,
            group,
            job.shard,
            job.groups[group],
            files,
            keys,
            rejects,
            entry,
            max_reject_rate=self.stage.max_reject_rate,
        )

    def _text(self, job: Job, group: str) -> Commit:
        stage = self.stage
        by_key = chosen_captions(
            self.store,
            stage.source,
            stage.mix,
            self.settings.seed,
            self._images(job),
            job.groups[group]["captions_made"],
        )
        by_key = {key: caption for key, caption in by_key.items() if key not in job.dropped}
        rejects = [
            Reject(key, stage.name, "no-caption", f"{self.settings.captions} has no caption for it")
            for key, caption in by_key.items()
            if not caption
        ]
        by_key = {key: caption for key, caption in by_key.items() if caption}
        distinct = sorted(set(by_key.values()))
        samples: list[dict[str, Any]] = []
        truncated = 0
        for start in range(0, len(distinct), self.settings.batch_size):
            part = distinct[start : start + self.settings.batch_size]
            tokens, lengths = self._text_encoder.encode(part)
            truncated += int((lengths == tokens.shape[1]).sum())
            if self.settings.text == "full":
                lengths = lengths * 0 + tokens.shape[1]
            for caption, rows, length in zip(part, tokens.numpy(), lengths.tolist(), strict=True):
                samples.append({"caption": caption, "tokens": rows[:length].astype(DTYPE)})
        columns = {"caption": "str", "tokens": f"ndarray:{DTYPE}"}
        files, entry = self._mds_file(job, group, columns, samples)
        row_of = {caption: row for row, caption in enumerate(distinct)}
        rows = [row_of[caption] for caption in by_key.values()]
        files[keys_name(job.shard.id, job.groups[group])] = _keys_table(by_key, rows)
        return write_shard(
            self.store,
            group,
            job.shard,
            job.groups[group],
            files,
            list(by_key),
            rejects,
            entry,
            {"distinct_captions": len(distinct), "captions_at_full_length": truncated},
            self.stage.max_reject_rate,
        )

    def _mds_file(
        self, job: Job, group: str, columns: dict[str, str], samples: list[dict[str, Any]]
    ) -> tuple[dict[str, bytes], dict[str, Any] | None]:
        """({file name: bytes}, index entry); nothing where the shard has no sample left."""
        if not samples:
            return {}, None
        name = f"{job.shard.id}-{fingerprint(job.groups[group])}.mds"
        hashes, compression = self.settings.hashes, self.settings.compression
        data, entry = encode_shard(columns, samples, name, hashes, compression)
        return {stored(entry)["basename"]: data}, entry

    def _images(self, job: Job) -> Commit:
        images = layout.images_group(self.stage.source)
        content = next(iter(job.groups.values()))["images"]
        return images_commit(self.store, images, job.shard.id, content)

    def _reject(self, key: str, error: BadPicture) -> Reject:
        return Reject(key, self.stage.name, error.reason, str(error))


def keys_name(shard: str, inputs: dict[str, Any]) -> str:
    """The file beside an MDS shard that maps each sample's key to its row there."""
    return f"{shard}-{fingerprint(inputs)}.parquet"


def _keys_table(keys: Iterable[str], rows: Iterable[int]) -> bytes:
    import pyarrow as pa

    from pipeline.core.tables import to_parquet

    columns = {"key": pa.array(list(keys), pa.string()), "row": pa.array(list(rows), pa.int32())}
    return to_parquet(pa.table(columns))

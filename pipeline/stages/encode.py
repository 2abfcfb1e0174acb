"""`pipeline run encode`: pictures and captions to latents and token vectors, in MDS column groups.

Each output group (latents by VAE and resolution, text by encoder and captions) has its own commits,
so a worker makes only the groups that are wanted and loads only the encoders they need.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.core import drops, layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import MAX_REJECT_RATE
from pipeline.core.samples import InputShard
from pipeline.core.stage import Job, Needs, Worker
from pipeline.core.store import Store
from pipeline.core.tokens import row_bytes
from pipeline.stages.captions import ALT, upstream
from pipeline.stages.encode_settings import (
    DECODE_THREADS,
    THREADS,
    VERSION,
    EncodeSettings,
    Outputs,
)
from pipeline.stages.looks import findings


class Encode(Outputs):
    def __init__(
        self, source: str, settings: EncodeSettings, max_reject_rate: float = MAX_REJECT_RATE
    ) -> None:
        super().__init__(source, settings, max_reject_rate)
        on_gpu = settings.device == "cuda"
        self.needs = Needs(DECODE_THREADS, 1, 2) if on_gpu else Needs()

    def plan(self, catalog: Catalog) -> Iterable[Job]:
        images = catalog.heads(layout.images_group(self.source))
        captions = upstream(catalog, self.source, self.mix, images)
        dropped = catalog.dropped(self.source)
        mended = {
            group: catalog.mended(group, findings(catalog, group))
            for group in map(self.latents_group, self.settings.resolutions)
        }
        settings = self.settings
        common: dict[str, Any] = {
            "stage": self.name,
            "version": VERSION,
            "device": settings.device,
            "threads": THREADS,
        }
        if settings.hashes:
            common["hashes"] = list(settings.hashes)
        if settings.compression:
            common["compression"] = settings.compression
        latents = {
            self.latents_group(r): {"vae": self.vae.model_dump(), **self._latents_inputs(r)}
            for r in settings.resolutions
        }
        text = {"text_encoder": self.text.model_dump(), **self._text_inputs()}
        for shard, head in images.items():
            keys = dropped.get(shard, frozenset())
            own = {**common, "images": head.content, **drops.inputs(keys)}
            groups = {group: {**own, **inputs} for group, inputs in latents.items()}
            for group, inputs in groups.items():
                if kinds := mended[group].get(shard):
                    inputs["mended"] = kinds
            if shard in captions:
                groups[self.text_group()] = {**own, "captions_made": captions[shard], **text}
            yield Job(InputShard(shard, head.split), groups, keys, head.samples)

    def estimate(self, job: Job, group: str) -> int:
        inputs = job.groups[group]
        if "resolution" in inputs:
            side = inputs["resolution"] // self.vae.downsample
            return job.samples * self.latent_channels() * side * side * 2
        return job.samples * self.text.length * row_bytes(self.text.width, self.settings.text_dtype)

    def open(self, store: Store) -> Worker:
        import torch

        from pipeline.stages.encode_worker import EncodeWorker

        if self.settings.device == "cpu":
            torch.set_num_threads(THREADS)
        return EncodeWorker(self, store, DECODE_THREADS if self.needs.gpus else 0)

    def _latents_inputs(self, resolution: int) -> dict[str, Any]:
        s = self.settings
        seeded = s.crop == "random" or s.latents == "sample"
        return {
            "resolution": resolution,
            "crop": s.crop,
            "small": s.small,
            "latents": s.latents,
            "dtype": "float16",
            "batch_size": s.batch(resolution),
            "seed": s.seed if seeded else None,
            "compile": s.compile,
        }

    def _text_inputs(self) -> dict[str, Any]:
        s = self.settings
        return {
            "captions": self.mix.weights,
            # A captioner may have written several captions of a picture, of which one is drawn.
            "seed": None if list(self.mix.weights) == [ALT] else s.seed,
            "text": s.text,
            "dtype": s.text_dtype,
            "batch_size": s.batch(),
        }

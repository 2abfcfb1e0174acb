"""`pipeline run encode`: pictures and captions to latents and token vectors, in MDS column groups.

Each output group (latents by VAE and resolution, text by encoder and captions) has its own commits,
so a worker makes only the groups that are wanted and loads only the encoders they need.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.core import drops, layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import MAX_REJECT_RATE
from pipeline.core.errors import SettingError
from pipeline.core.images import Crop, Small
from pipeline.core.mds import check_options
from pipeline.core.mix import Mix
from pipeline.core.samples import InputShard
from pipeline.core.store import Store
from pipeline.core.tokens import row_bytes
from pipeline.encoders import find_text, find_vae
from pipeline.stages import Job, Needs, Worker
from pipeline.stages.captions import ALT, upstream
from pipeline.stages.latents import Recipe
from pipeline.stages.looks import findings

VERSION = 3  # bump when the bytes this stage writes change
THREADS = 1  # torch threads a worker on CPUs: part of what decides the last bit of a latent
DECODE_THREADS = 8  # beside a GPU: SDXL's VAE takes 350 pictures of 512 px a second on an H100


@dataclass(frozen=True)
class EncodeSettings:
    """What to make. Defaults are the paper's."""

    vae: str = "sdxl"
    text_encoder: str = "dfn5b-h14"
    resolutions: tuple[int, ...] = (256, 512)
    captions: str = "alt"  # a captioner, or a mix "alt:0.9,colour:0.1"
    text: Literal["full", "trimmed"] = "full"  # trimmed: rows up to end-of-text only
    text_dtype: Literal["float16", "int8"] = "float16"
    latents: Literal["mean", "sample", "moments"] = "mean"  # of the posterior
    crop: Crop = "center"
    small: Small = "reject"  # a picture smaller than the resolution
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # encoders compute in; bfloat16 on GPUs
    batch_size: int | Literal["auto"] = "auto"
    seed: int = 0  # of crops, posterior samples and caption mixes, with the sample's key
    device: Literal["cpu", "cuda"] = "cpu"  # cuda: each worker holds one GPU
    compile: bool = False  # torch.compile the VAE
    hashes: tuple[str, ...] = ()  # in the MDS index, for readers that check; the commit has its own
    compression: str | None = None  # of MDS files: zstd takes 8 % off latents

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in kind:
                known = ", ".join(kind)
                raise SettingError(f"{name}={getattr(self, name)}: use one of {known}")
        if self.batch_size != "auto" and self.batch_size < 1:
            raise SettingError(f"batch_size={self.batch_size}: use 1 or more, or auto")
        try:
            check_options(self.hashes, self.compression)
        except ValueError as error:
            raise SettingError(str(error)) from error
        if not self.resolutions:
            raise SettingError("resolutions: name at least one, e.g. 256,512")

    def compute_dtype(self) -> str:
        if self.dtype == "auto":
            return "bfloat16" if self.device == "cuda" else "float32"
        return self.dtype

    def batch(self, resolution: int | None = None) -> int:
        """Pictures of this resolution, or captions, in a batch: settled before the fingerprint.

        On a GPU 32 pictures of 512 px fill an H100's units and fit into 24 GB.
        """
        if self.batch_size != "auto":
            return self.batch_size
        if self.device == "cpu":
            return 16
        return 256 if resolution is None else max(1, min(256, 32 * 512**2 // resolution**2))


_CHOICES: dict[str, tuple[str, ...]] = {
    "text": ("full", "trimmed"),
    "text_dtype": ("float16", "int8"),
    "latents": ("mean", "sample", "moments"),
    "crop": ("center", "random", "none"),
    "small": ("reject", "upscale"),
    "dtype": ("auto", "float32", "bfloat16"),
    "device": ("cpu", "cuda"),
}


class Encode:
    name = "encode"

    def __init__(
        self, source: str, settings: EncodeSettings, max_reject_rate: float = MAX_REJECT_RATE
    ) -> None:
        self.source = source
        self.settings = settings
        self.max_reject_rate = max_reject_rate
        on_gpu = settings.device == "cuda"
        self.needs = Needs(DECODE_THREADS, 1, 2) if on_gpu else Needs()
        self.mix = Mix.parse(settings.captions)
        computed = {"dtype": settings.compute_dtype()}
        self.vae = find_vae(settings.vae)[0].model_copy(update=computed)
        # The text tower always computes in float32: it is a hundredth of the work.
        self.text, _ = find_text(settings.text_encoder)
        for resolution in settings.resolutions:
            if resolution <= 0 or resolution % self.vae.downsample:
                raise SettingError(
                    f"resolutions={resolution}: {settings.vae} needs a multiple of "
                    f"{self.vae.downsample}"
                )

    def groups(self) -> list[str]:
        return [*map(self.latents_group, self.settings.resolutions), self.text_group()]

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
            return job.samples * self._latent_channels() * side * side * 2
        return job.samples * self.text.length * row_bytes(self.text.width, self.settings.text_dtype)

    def open(self, store: Store) -> Worker:
        import torch

        from pipeline.stages.encode_worker import EncodeWorker

        if self.settings.device == "cpu":
            torch.set_num_threads(THREADS)
        return EncodeWorker(self, store, DECODE_THREADS if self.needs.gpus else 0)

    def latents_group(self, resolution: int) -> str:
        s = self.settings
        return layout.latents_group(self.source, s.vae, resolution, s.latents, s.crop)

    def text_group(self) -> str:
        s = self.settings
        return layout.text_group(self.source, s.text_encoder, s.captions, s.text, s.text_dtype)

    def recipe(self, resolution: int) -> Recipe:
        s = self.settings
        return Recipe(
            resolution=resolution,
            batch_size=s.batch(resolution),
            crop=s.crop,
            small=s.small,
            latents=s.latents,
            dtype="float16",
            seed=s.seed,
        )

    def latents_columns(self, resolution: int) -> dict[str, str]:
        side = resolution // self.vae.downsample
        return {"key": "str", "latent": f"ndarray:float16:{self._latent_channels()},{side},{side}"}

    def _latent_channels(self) -> int:
        return self.vae.channels * (2 if self.settings.latents == "moments" else 1)

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

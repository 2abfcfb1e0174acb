"""What `pipeline run encode` is told, and the groups that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.core import layout
from pipeline.core.commits import MAX_REJECT_RATE
from pipeline.core.errors import SettingError
from pipeline.core.images import Crop, Small
from pipeline.core.mds import check_options
from pipeline.core.mix import Mix
from pipeline.encoders import find_text, find_vae
from pipeline.stages.latents import Recipe

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


class Outputs:
    """The groups that `encode` makes of one source, and how each sample of them is made.

    Raises:
        SettingError: unknown encoders, or a resolution that the VAE cannot halve.
    """

    name = "encode"

    def __init__(
        self, source: str, settings: EncodeSettings, max_reject_rate: float = MAX_REJECT_RATE
    ) -> None:
        self.source = source
        self.settings = settings
        self.max_reject_rate = max_reject_rate
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
        return {"key": "str", "latent": f"ndarray:float16:{self.latent_channels()},{side},{side}"}

    def latent_channels(self) -> int:
        """Of the stored latent."""
        return self.vae.channels * (2 if self.settings.latents == "moments" else 1)

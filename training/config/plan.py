"""What a run trains: its settings, with the encoders, sizes and shards they were found to fit."""

from __future__ import annotations

import dataclasses
import os
import shlex
from dataclasses import dataclass
from typing import Any

from pipeline.core import layout
from pipeline.core.errors import SettingError
from pipeline.core.manifest import LatentsManifest, TextFacts, TextManifest, VaeFacts
from training.config.settings import Config
from training.config.stage_settings import StageSettings
from training.network.config import MODELS, DiTConfig

PATCH_SIZE = 2  # of every network of the paper


class MissingData(SettingError):
    """Groups or shards that a `pipeline run` command makes."""


@dataclass(frozen=True)
class TrainingSource:
    """One source's two column groups at one resolution, of the wanted split."""

    name: str
    latents_group: str
    text_group: str
    latents: LatentsManifest
    text: TextManifest
    samples: int  # without those that are left out
    latent_bytes: int  # of all its samples, as stored
    text_bytes: int  # of all its distinct captions
    captions: int  # distinct ones, counted a shard
    packed: bool  # whether latents are compressed: they are unpacked in the cache, not in the root
    left_out: dict[str, int]  # reason -> pictures that training does not see

    def command(self, config: Config) -> str:
        return encode_command(config, self.name, self.latents.resolution)


@dataclass(frozen=True)
class TrainingPlan:
    """A config whose encoders, sizes and (where `data` is filled) shards are known to fit."""

    config: Config
    vae: VaeFacts
    text: TextFacts
    data: dict[str, list[TrainingSource]]  # stage -> its sources

    def shares(self, name: str) -> list[float]:
        """How much of an epoch of this stage each of its sources is; their sum is 1."""
        sources, asked = self.data[name], self.config.sources_of(self.config.stages[name])
        weights = [asked[s.name] if isinstance(asked, dict) else s.samples for s in sources]
        return [weight / sum(weights) for weight in weights]

    def latent_side(self, stage: StageSettings) -> int:
        return stage.resolution // self.vae.downsample

    def patch_size(self) -> int:
        return self.config.model.patch_size or PATCH_SIZE

    def network(self, stage: StageSettings) -> dict[str, Any]:
        """Fields of DiTConfig that this run sets at this stage; the others are the arch's own."""
        return {
            **self.config.model.sizes(),
            "input_size": self.latent_side(stage),
            "in_channels": self.vae.channels,
            "caption_width": self.text.width,
            "caption_length": self.text.length,
            "pos_interp_scale": stage.resolution / self.config.base_resolution(),
        }


def network_config(plan: TrainingPlan, stage: StageSettings) -> DiTConfig:
    """The network of a stage.

    Raises:
        SettingError: sizes that no network can have.
    """
    base = MODELS.get(plan.config.model.arch, DiTConfig())
    try:
        return dataclasses.replace(base, **plan.network(stage))
    except ValueError as error:
        raise SettingError(f"model: {error}") from error


def encode_command(config: Config, source: str, resolution: int) -> str:
    """The command that makes the groups a run wants of one source."""
    data = config.data
    words = ["pipeline", "run", "encode", "--source", source]
    if data.root != (os.environ.get(layout.ROOT_VARIABLE) or layout.DEFAULT_ROOT):
        words += ["--root", data.root]
    words += ["--vae", data.vae, "--text-encoder", data.text_encoder]
    words += [
        "--resolutions",
        str(resolution),
        "--captions",
        data.captions_of(source),
        "--text",
        data.text,
    ]
    if data.text_dtype != "float16":
        words += ["--text-dtype", data.text_dtype]
    if data.latents != "mean":
        words += ["--latents", data.latents]
    if data.crop != "center":
        words += ["--crop", data.crop]
    return f"`{shlex.join(words)}`"

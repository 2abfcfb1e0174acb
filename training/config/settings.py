"""The settings of a training run, section by section. No torch here.

A setting lives in one place. Those that may change from stage to stage stand under `defaults` and
are overridden in `stages.<name>`; a stage states only what differs. Sizes that the VAE or the text
encoder decide (channels, token width) are never settings: they come from the encoders' tables and
the groups' manifests.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from pipeline.core import layout
from pipeline.core.errors import nearest
from pipeline.core.location import Location, located
from training.config.stage_settings import (
    NOISE,
    STAGE_NAME,
    Count,
    Positive,
    Section,
    Share,
    Sources,
    StageSettings,
)
from training.network.config import FeedForward

Seed = Annotated[int, Field(ge=0, description="needs a number, any one")]
FILES = ("cache", "config.json", "leases", "model.safetensors")  # of a run, beside its stages

Pair = Annotated[tuple[Positive, Positive], Field(strict=False)]  # YAML has lists, no tuples

# The same for every source, or of some by name. The tags keep messages to one line with their key.
Captions = Annotated[
    Annotated[str, Tag("[one]")] | Annotated[dict[str, str], Tag("[by source]")],
    Discriminator(lambda value: "[by source]" if isinstance(value, dict) else "[one]"),
]


def _size(value: Any) -> Any:
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch(r"(\d+(\.\d+)? ?[KMGTP]?B?)?", text):
        raise ValueError("give a size in bytes, e.g. 500GB or 2TB")
    return text


class Data(Section):
    """Which column groups are streamed, and how."""

    root: Location = Field(
        default_factory=lambda: located(os.environ.get(layout.ROOT_VARIABLE) or layout.DEFAULT_ROOT)
    )
    sources: Sources
    vae: Location
    latents: Literal["mean", "sample", "moments"] = "mean"  # moments: a new sample every epoch
    crop: Literal["center", "random"] = "center"  # latents and crop: as encoded
    text_encoder: Location
    #: A captioner or a mix, as given to `pipeline run encode`; or source: that, for those whose
    #: captions are not their own.
    captions: Captions = "alt"
    text: Literal["full", "trimmed"] = "full"
    text_dtype: Literal["float16", "int8"] = "float16"  # of the stored token vectors
    split: str = "train"
    caption_drop: Share = 0.1  # how often a caption is dropped, for classifier-free guidance
    #: Loader processes a rank.
    workers: Annotated[int, Field(ge=0, description="0 reads in the trainer")] = 2
    cache: Location = ""  # folder for shards of a remote or compressed root; default <folder>/cache
    # What the cache may hold, e.g. 500GB; "": any amount.
    cache_limit: Annotated[str, BeforeValidator(_size)] = ""
    check_hashes: bool = False  # each shard against its commit's sha256, when it is opened first
    skip_damaged: bool = False  # damaged shards are left out and counted; False: end the run

    def cache_bytes(self) -> int:
        """0 for any number."""
        number = self.cache_limit.removesuffix("B").strip()
        power = "KMGTP".find(number[-1:]) + 1 if number[-1:].isalpha() else 0
        return int(float(number.rstrip("KMGTP ") or 0) * 1000**power)

    def captions_of(self, source: str) -> str:
        return self.captions if isinstance(self.captions, str) else self.captions.get(source, "alt")

    def all_captions(self) -> str:
        """As one line, for metadata: "alt", or "alt; sa1b: llava-1.5-7b"."""
        if isinstance(self.captions, str):
            return self.captions
        return "; ".join(["alt", *(f"{source}: {own}" for source, own in self.captions.items())])


class Model(Section):
    """A network of the paper, or sizes that replace some of its own; see DiTConfig."""

    arch: Literal["MicroDiT_XL_2", "MicroDiT_Tiny_2", "custom"]  # custom: DiTConfig's defaults
    base_resolution: Count | None = None  # where positions have scale 1; default: first stage's
    patch_size: Count | None = None
    width: Count | None = None
    depth: Count | None = None
    head_dim: Count | None = None
    qkv_multipliers: Pair | None = None
    ffn_multipliers: Pair | None = None
    feed_forward: FeedForward | None = None
    multiple_of: Count | None = None
    mixer_width: Count | None = None
    mixer_depth: Annotated[int, Field(ge=0)] | None = None
    mixer_ffn_multiplier: Positive | None = None
    num_experts: Count | None = None
    expert_capacity: Positive | None = None
    moe_every: Annotated[int, Field(ge=0)] | None = None
    decoder_width: Count | None = None
    decoder_depth: Annotated[int, Field(ge=0)] | None = None
    norm_eps: Positive | None = None

    def sizes(self) -> dict[str, Any]:
        """The fields of DiTConfig that this section states."""
        return self.model_dump(exclude={"arch", "base_resolution"}, exclude_none=True)


class Edm(Section):
    """What all stages share of objective edm; see training.objectives.edm.EDM."""

    sigma_data: Positive = 0.9
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0


class Muon(Section):
    """Muon for the matrices of the blocks, AdamW for all else; see training.optim.muon.Muon."""

    lr: Positive = 1.0  # times the stage's lr
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    nesterov: bool = True
    scale: Literal["rms", "spectral"] = "rms"  # of an update: AdamW's (Moonlight), or Muon's own


class Optimizer(Section):
    """AdamW, and where `muon` is given Muon too; the learning rate belongs to the stages."""

    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False),
    ] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    expert_lr: Positive = 0.5  # of the mixture-of-experts layers, times what it is elsewhere
    muon: Muon | None = None


class Logging(Section):
    every: Positive = 10.0  # seconds between progress lines where there is no terminal
    every_steps: Count = 10  # steps between what loggers get; metrics.jsonl has every step
    to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=[])


class Checkpoint(Section):
    keep: Count = 1  # of each unfinished stage; a finished one keeps its last
    skip_damaged: bool = False  # go on from the checkpoint before one that is damaged
    remote: Location = ""  # folder or URL for copies; a start with less goes on from there


class Evaluate(Section):
    """The loss on pictures that training never sees, in bins of noise."""

    every: Annotated[int, Field(ge=0)] = 1000  # steps, and at the end of a stage; 0: never
    samples: Count = 256  # of all sources of the stage together, always the same ones
    bins: Count = 8  # noise levels: the middles of as many equal parts of training's distribution
    split: str = "heldout"


class Samples(Section):
    """Sheets of pictures, painted while training."""

    every: Annotated[int, Field(ge=0)] = 0  # steps, and at the end of a stage; 0: never
    # Default: held-out captions, whose token vectors are in the shards.
    prompts: list[str] = Field(default=[])
    count: Count = 8  # of held-out captions
    guidance: Positive = 5.0
    steps: Count = 30  # Heun steps
    seed: Seed = 0


class Guard(Section):
    """What happens at a loss or gradient that is no number, or that jumps."""

    in_a_row: Count = 3  # so many bad steps in a row: back to the last checkpoint
    rollbacks: Annotated[int, Field(ge=0)] = 3  # to one and the same checkpoint, then the run stops
    loss_spike: Positive | None = None  # bad above median + so many deviations (1.4826 MAD)
    grad_spike: Positive | None = None  # the same of the gradients' norm
    window: Annotated[int, Field(ge=8)] = 128  # last steps that median and deviation are of


class Estimate(Section):
    """Assumptions of the costs that dry_run prints and a run on GPUs logs."""

    mfu: Annotated[float, Field(gt=0, le=1)] = 0.4  # model FLOPs utilisation
    gpu: str = "H100"
    peak_tflops: Positive = 989.0  # dense bf16
    dollars_per_gpu_hour: Positive = 3.75


class Config(Section):
    name: Annotated[str, Field(pattern=STAGE_NAME)]
    folder: Location = ""  # default runs/<name>
    seed: Seed = 18
    init_from: Location = ""  # run folder or weights file to start from; default: random weights
    # auto: bf16 through autocast on CUDA, fp32 on CPU. fp64 is for comparisons, not for training.
    precision: Literal["auto", "fp64", "fp32", "amp_bf16"] = "auto"
    parallel: Literal["ddp", "fsdp2"] = "ddp"  # ranks hold all weights, or a part each
    compile: bool = False  # the network's blocks through torch.compile: a slow start, faster steps
    # released: as the published code trains, which applies neither its averages of the weights nor
    # its experts' learning rate; `resolve` sets ema and optimizer.expert_lr to what that means.
    fidelity: Literal["intended", "released"] = "intended"
    dry_run: bool = False  # print the resolved config and the costs, train nothing
    stage: str = ""  # run this one alone; the one before it has to be finished
    data: Data
    model: Model
    objective: Literal["edm", "flow"] = "edm"  # see training.objectives
    edm: Edm | None = None  # of objective edm
    optimizer: Optimizer = Optimizer()
    logging: Logging = Logging()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    samples: Samples = Samples()
    guard: Guard = Guard()
    estimate: Estimate = Estimate()
    stages: dict[Annotated[str, Field(pattern=STAGE_NAME)], StageSettings]

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._check_names()
        if self.stage and self.stage not in self.stages:
            near = nearest(self.stage, self.stages) or f"; stages: {', '.join(self.stages)}"
            raise ValueError(f"stage {self.stage}: no such stage{near}")
        first, stage = next(iter(self.stages.items()))
        if stage.keep_moments:
            raise ValueError(f"stages.{first}.keep_moments: no stage before has moments; remove it")
        if self.edm is not None and self.objective != "edm":
            raise ValueError(f"edm: not read by objective {self.objective}; remove the section")
        if isinstance(self.data.captions, dict):
            sources = {name for stage in self.stages.values() for name in self.sources_of(stage)}
            for name in self.data.captions:
                if name not in sources:
                    raise ValueError(
                        f"data.captions.{name}: no source of that name{nearest(name, sources)}"
                    )
        for name, stage in self.stages.items():
            for objective, keys in NOISE.items():
                for key in keys:
                    if (getattr(stage, key) is None) == (objective == self.objective):
                        raise ValueError(f"stages.{name}.{key}: {self._why_not(key)}")
        return self

    def _check_names(self) -> None:
        if "://" in self.folder:
            raise ValueError(
                f"folder {self.folder}: a run trains in a local folder; give checkpoint.remote the "
                "URL, and copies go there"
            )
        if not self.folder.isprintable():  # it goes into records, messages and metadata
            raise ValueError(f"folder {self.folder!r}: has characters that cannot be shown")
        for name in self.stages:
            if name in FILES:
                raise ValueError(
                    f"stages.{name}: {name} is something else in a run's folder; choose another"
                )

    def _why_not(self, key: str) -> str:
        own = NOISE[self.objective]
        if key in own:
            return f"objective {self.objective} needs a number; its default is {own[key]:g}"
        return f"not read by objective {self.objective}, which reads {', '.join(own)}"

    def objective_settings(self, stage: StageSettings) -> dict[str, float]:
        """The fields of the objective's dataclass at a stage."""
        shared = self.edm.model_dump() if self.edm else {}
        return shared | {key: getattr(stage, key) for key in NOISE[self.objective]}

    def run_folder(self) -> Path:
        return Path(self.folder or f"runs/{self.name}")

    def base_resolution(self) -> int:
        """The resolution at which position coordinates are patch indices, unscaled."""
        return self.model.base_resolution or next(iter(self.stages.values())).resolution

    def sources_of(self, stage: StageSettings) -> list[str] | dict[str, float]:
        """The names of a stage's sources, or their weights by name."""
        return stage.sources or self.data.sources

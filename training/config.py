"""What a training run is told: a YAML file, then `dotted.key=value` arguments. No torch here.

A setting lives in one place. Those that may change from stage to stage stand under `defaults` and
are overridden in `stages.<name>`; a stage states only what differs. Sizes that the VAE or the text
encoder decide (channels, token width) are never settings: they come from the encoders' tables and
the groups' manifests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from pipeline.core import layout
from pipeline.core.errors import SettingError, nearest
from training.masking import MASKS

STAGE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # a stage's name is a folder's name

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Pair = Annotated[tuple[Positive, Positive], Field(strict=False)]  # YAML has lists, no tuples


def _unique(names: list[str]) -> list[str]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice; give sources weights, {{{twice}: 2, …}}")
    return names


# Names, drawn from in proportion to their sizes, or name -> weight: the source's share of an epoch,
# relative to the others'. An epoch has as many samples as its sources have together: a source whose
# weight is above its size comes several times in it, of one below it a new random part each epoch.
Sources = Annotated[
    Annotated[list[str], Field(min_length=1), AfterValidator(_unique), Tag("[names]")]
    | Annotated[dict[str, Positive], Field(min_length=1), Tag("[weights]")],
    Discriminator(lambda value: "[weights]" if isinstance(value, dict) else "[names]"),
]


class Section(BaseModel):
    """Strict: "1e-3" in quotes is no number and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    """Which column groups are streamed, and how."""

    root: str = Field(
        default_factory=lambda: os.environ.get(layout.ROOT_VARIABLE) or layout.DEFAULT_ROOT
    )
    sources: Sources
    vae: str
    latents: Literal["mean", "sample", "moments"] = "mean"  # moments: a new sample every epoch
    crop: Literal["center", "random"] = "center"  # latents and crop: as encoded
    text_encoder: str
    captions: str = "alt"  # a captioner or a mix, as given to `pipeline run encode`
    text: Literal["full", "trimmed"] = "full"
    text_dtype: Literal["float16", "int8"] = "float16"  # of the stored token vectors
    split: str = "train"
    caption_drop: Share = 0.1  # how often a caption is dropped, for classifier-free guidance
    workers: Annotated[int, Field(ge=0)] = 2  # loader processes a rank; 0 reads in the trainer
    cache: str = ""  # folder for shards of a remote root; default <folder>/cache


class Model(Section):
    """A network of the paper, or sizes that replace some of its own; see training.dit.DiTConfig."""

    arch: Literal["MicroDiT_XL_2", "MicroDiT_Tiny_2", "custom"]  # custom: DiTConfig's defaults
    base_resolution: Count | None = None  # where positions have scale 1; default: first stage's
    patch_size: Count | None = None
    width: Count | None = None
    depth: Count | None = None
    head_dim: Count | None = None
    qkv_multipliers: Pair | None = None
    ffn_multipliers: Pair | None = None
    multiple_of: Count | None = None
    mixer_width: Count | None = None
    mixer_depth: Annotated[int, Field(ge=0)] | None = None
    mixer_ffn_multiplier: Positive | None = None
    num_experts: Count | None = None
    expert_capacity: Positive | None = None
    moe_every: Annotated[int, Field(ge=0)] | None = None
    norm_eps: Positive | None = None

    def sizes(self) -> dict[str, Any]:
        """The fields of DiTConfig that this section states."""
        return self.model_dump(exclude={"arch", "base_resolution"}, exclude_none=True)


class Edm(Section):
    """Noise levels and preconditioning that all stages share; see training.denoiser.EDM."""

    sigma_data: Positive = 0.9
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0


class Optimizer(Section):
    """AdamW, on every parameter; the learning rate belongs to the stages."""

    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False),
    ] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1


class Stage(Section):
    """One stretch of training with its own loader and schedule. Steps count from its own start."""

    steps: Count
    resolution: Count  # side of the pictures, pixels
    batch_size: Count  # over all ranks
    lr: Positive
    sources: Sources | None = None  # default: data.sources
    microbatch: Count | None = None  # samples a rank computes at once; default: all of its share
    mask: str = "none"  # a scheme of training.masking
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of patches the backbone drops
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0  # steps of linear warm-up, then the schedule
    final_lr: Share = 0.0  # where cosine ends, as a share of lr
    p_mean: float = -0.6  # of ln(sigma)
    p_std: Positive = 1.2
    clip: Positive | None = None  # largest global gradient norm
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay a step; none: no average
    ema_start: Annotated[int, Field(ge=0)] = 0  # the average restarts at the weights of this step
    keep_moments: bool = False  # go on with the previous stage's AdamW moments
    save_every: Count = 1000  # steps between checkpoints

    @model_validator(mode="after")
    def _check(self) -> Stage:
        if self.mask not in MASKS:
            raise ValueError(
                f"mask {self.mask}: unknown{nearest(self.mask, MASKS)}; known: {', '.join(MASKS)}"
            )
        if self.mask == "none" and self.mask_ratio:
            raise ValueError(f"mask_ratio {self.mask_ratio} with mask none: name a mask, deferred")
        if self.warmup >= self.steps and self.warmup:
            raise ValueError(f"warmup {self.warmup}: must be shorter than steps {self.steps}")
        if self.ema_start and self.ema is None:
            raise ValueError(f"ema_start {self.ema_start} without ema: give a decay, e.g. 0.9999")
        return self


class Logging(Section):
    every: Positive = 10.0  # seconds between progress lines where there is no terminal
    every_steps: Count = 10  # steps between what loggers get; metrics.jsonl has every step
    to: list[Literal["tensorboard", "wandb", "mlflow"]] = []


class Checkpoint(Section):
    keep: Count = 1  # of each unfinished stage; a finished one keeps its last


class Evaluate(Section):
    """The loss on pictures that training never sees, in bins of noise."""

    every: Annotated[int, Field(ge=0)] = 1000  # steps, and at the end of a stage; 0: never
    samples: Count = 256  # of all sources of the stage together, always the same ones
    bins: Count = 8  # noise levels: the middles of as many equal parts of training's distribution
    split: str = "heldout"


class Samples(Section):
    """Sheets of pictures, painted while training."""

    every: Annotated[int, Field(ge=0)] = 0  # steps, and at the end of a stage; 0: never
    prompts: list[str] = []  # default: held-out captions, whose token vectors are in the shards
    count: Count = 8  # of held-out captions
    guidance: Positive = 5.0
    steps: Count = 30  # Heun steps
    seed: Annotated[int, Field(ge=0)] = 0


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
    folder: str = ""  # default runs/<name>
    seed: Annotated[int, Field(ge=0)] = 18
    precision: Literal["auto", "fp32", "amp_bf16"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    dry_run: bool = False  # print the resolved config and the costs, train nothing
    data: Data
    model: Model
    edm: Edm = Edm()
    optimizer: Optimizer = Optimizer()
    logging: Logging = Logging()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    samples: Samples = Samples()
    guard: Guard = Guard()
    estimate: Estimate = Estimate()
    stages: dict[Annotated[str, Field(pattern=STAGE_NAME)], Stage]

    def run_folder(self) -> Path:
        return Path(self.folder or f"runs/{self.name}")

    def base_resolution(self) -> int:
        """The resolution at which position coordinates are patch indices, unscaled."""
        return self.model.base_resolution or next(iter(self.stages.values())).resolution

    def sources_of(self, stage: Stage) -> list[str] | dict[str, float]:
        """The names of a stage's sources, or their weights by name."""
        return stage.sources or self.data.sources


def load(arguments: Sequence[str]) -> Config:
    """`FILE.yaml [dotted.key=value …]` -> the resolved config.

    Raises:
        SettingError: no such file, no YAML, an unknown key or stage, a wrong type; a line each.
    """
    files = [a for a in arguments if "=" not in a]
    if len(files) != 1:
        shown = " ".join(files) or "none"
        raise SettingError(
            f"give one YAML file, then dotted.key=value; files given: {shown}. "
            "For example: composer training/train.py yamls/demo.yaml stages.full.lr=1e-3"
        )
    raw = _read(Path(files[0]), [a for a in arguments if "=" in a])
    return resolve(raw)


def resolve(raw: dict[str, Any]) -> Config:
    """A nested mapping as a YAML file holds it -> the config, each stage completed by `defaults`.

    Raises:
        SettingError: a key that is unknown or missing, or a value of a wrong type; a line each.
    """
    raw = dict(raw)
    defaults = _mapping(raw.pop("defaults", None), "defaults")
    stages = _mapping(raw.get("stages"), "stages")
    if not stages:
        raise SettingError("stages: missing; name at least one, e.g. stages: {full: {steps: 1000}}")
    try:
        Stage.model_validate(defaults)
    except ValidationError as error:
        # Only a stage, not the defaults, has to be complete and consistent.
        wrong = [e for e in error.errors() if e["type"] not in ("missing", "value_error")]
        if wrong:
            raise SettingError(_lines(wrong, ["defaults"])) from error
    merged = {str(k): {**defaults, **_mapping(v, f"stages.{k}")} for k, v in stages.items()}
    try:
        return Config.model_validate({**raw, "stages": merged})
    except ValidationError as error:
        raise SettingError(_lines(error.errors(), [])) from error


def _read(path: Path, overrides: list[str]) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        base = OmegaConf.load(path)
    except OSError as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise SettingError(f"{path}: {error.strerror}{near}") from error
    except yaml.YAMLError as error:
        raise SettingError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        file = OmegaConf.to_container(base)
        if not isinstance(file, dict):
            raise SettingError(f"{path}: expected a mapping of settings, found a list")
        _known_stages(overrides, [str(key) for key in _mapping(file.get("stages"), "stages")])
        merged = OmegaConf.merge(base, OmegaConf.from_dotlist(overrides))
        result = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise SettingError(f"{path}: {' '.join(str(error).split())}") from error
    return {str(key): value for key, value in result.items()}  # pyright: ignore


def _known_stages(overrides: list[str], stages: list[str]) -> None:
    """An argument must not invent a stage: OmegaConf would append it to the run."""
    for item in overrides:
        key = item.split("=")[0]
        parts = key.split(".")
        if parts[0] == "stages" and len(parts) > 1 and parts[1] not in stages:
            raise SettingError(
                f"{key}: no such stage{nearest(parts[1], stages)}; stages: {', '.join(stages)}"
            )


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingError(f"{name}={value!r}: must be a mapping of settings")
    return value


def _lines(errors: Sequence[ErrorDetails], prefix: list[str]) -> str:
    return "\n".join(dict.fromkeys(_line(error, prefix) for error in errors))


def _line(error: ErrorDetails, prefix: list[str]) -> str:
    """One pydantic error as "key=value: what to do"."""
    # "[key]", and the tags of alternatives, are no part of the key that the user wrote.
    path = prefix + [str(part) for part in error["loc"] if not str(part).startswith("[")]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggest(path)}"
    if error["type"] == "missing":
        where = " (there or in defaults)" if path[0] == "stages" else ""
        return f"{key}: missing; give it a value{where}"
    if error["type"] == "value_error":
        return f"{key}: {error['msg'].removeprefix('Value error, ')}"
    shown = repr(error["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = f"{key}={shown}: {error['msg'][0].lower()}{error['msg'][1:]}"
    if error["type"] == "literal_error":
        message += nearest(str(error["input"]), re.findall("'(.*?)'", error["msg"]))
    return message


def _suggest(path: list[str]) -> str:
    """The key that was probably meant: of this section, or of the same name in another one."""
    *section, word = path
    known = _keys()
    siblings = {k[-1] for k in known if len(k) == len(path) and _matches(k[:-1], section)}
    elsewhere = [".".join(k) for k in known if k[-1] == word and k[0] != "stages"]
    if elsewhere:
        return f'; did you mean "{elsewhere[0]}"?'
    return nearest(word, siblings) or f"; known: {', '.join(sorted(siblings))}"


def _matches(pattern: Sequence[str], section: Sequence[str]) -> bool:
    return all(p in ("*", s) for p, s in zip(pattern, section, strict=True))


def _keys() -> list[tuple[str, ...]]:
    """Every key there is, as a path; "*" stands for the name of a stage."""
    paths: list[tuple[str, ...]] = [("defaults",)]
    for name, field in Config.model_fields.items():
        paths.append((name,))
        section: Any = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            paths += [(name, key) for key in section.model_fields]
        elif get_origin(section) is dict and get_args(section)[1] is Stage:
            paths += [("defaults", key) for key in Stage.model_fields]
            paths += [(name, "*", key) for key in Stage.model_fields]
    return paths

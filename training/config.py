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
from training.dit_config import FeedForward
from training.masking.ratio import Ratio, RatioSchedule
from training.masking.scheme import Scheme, make_scheme

STAGE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # a stage's name is a folder's name

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
_SCHEDULE = (dict, RatioSchedule)
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

# A share of an image's patches, or how it changes over the stage's steps.
MaskRatio = Annotated[
    Annotated[Ratio, Tag("[number]")] | Annotated[RatioSchedule, Tag("[schedule]")],
    Discriminator(lambda value: "[schedule]" if isinstance(value, _SCHEDULE) else "[number]"),
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


# Objective -> the settings of a stage that it alone reads, with their defaults: how noise levels
# are drawn in training, and flow's shift of them.
NOISE: dict[str, dict[str, float]] = {
    "edm": {"p_mean": -0.6, "p_std": 1.2},
    "flow": {"logit_mean": 0.0, "logit_std": 1.0, "shift": 1.0},
}


class Muon(Section):
    """Muon for the matrices of the blocks, AdamW for all else; see training.muon.Muon."""

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


class Power(Section):
    """A power-function average (Karras et al. 2024, arXiv 2312.02696): of all steps, most of the
    last; `power` is its width relative to the training so far, sigma_rel of equation 2."""

    power: Annotated[float, Field(gt=0, lt=0.28)]


Decay = Annotated[float, Field(gt=0, lt=1)]  # of an exponential average, a step
Profile = Annotated[
    Annotated[Decay, Tag("[decay]")] | Annotated[Power, Tag("[power]")],
    Discriminator(lambda value: "[power]" if isinstance(value, dict | Power) else "[decay]"),
]
# One average of the weights or several: 0.9999, {power: 0.1}, [0.9999, {power: 0.1}]. The first is
# what the stage's model.safetensors holds.
Averages = Annotated[
    Annotated[Profile, Tag("[one]")]
    | Annotated[list[Profile], Field(min_length=1), Tag("[several]")],
    Discriminator(lambda value: "[several]" if isinstance(value, list) else "[one]"),
]


class Stage(Section):
    """One stretch of training with its own loader and schedule. Steps count from its own start."""

    steps: Count
    resolution: Count  # side of the pictures, pixels
    batch_size: Count  # over all ranks
    lr: Positive
    sources: Sources | None = None  # default: data.sources
    microbatch: Count | None = None  # samples a rank computes at once; default: all of its share
    mask: str = "none"  # a scheme of training.masking
    mask_ratio: MaskRatio = 0.0  # share of patches that are masked
    mask_block: Literal[2, 4, 8] | None = None  # side of the cells that mask block drops
    tread_blocks: Annotated[tuple[int, int], Field(strict=False)] | None = None  # first and last
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0  # steps of linear warm-up, then the schedule
    final_lr: Share = 0.0  # where cosine ends, as a share of lr
    p_mean: float | None = None  # edm: of ln(sigma); default -0.6
    p_std: Positive | None = None  # edm; default 1.2
    logit_mean: float | None = None  # flow: of logit(t); default 0
    logit_std: Positive | None = None  # flow; default 1
    shift: Positive | None = None  # flow: towards noise, where there are more pixels; default 1
    clip: Positive | None = None  # largest global gradient norm
    ema: Averages | None = None  # averages of the weights; none: no average
    ema_start: Annotated[int, Field(ge=0)] = 0  # the averages restart at the weights of this step
    keep_moments: bool = False  # go on with the previous stage's moments of the optimizer
    save_every: Count = 1000  # steps between checkpoints

    @model_validator(mode="after")
    def _check(self) -> Stage:
        self.scheme()
        ratio = self.mask_ratio
        if self.mask == "none" and ratio:
            shown = "" if isinstance(ratio, RatioSchedule) else f" {ratio}"
            raise ValueError(f"mask_ratio{shown} with mask none: name a mask, deferred")
        if isinstance(ratio, RatioSchedule) and ratio.steps > self.steps:
            raise ValueError(
                f"mask_ratio.steps {ratio.steps}: beyond the stage's {self.steps} steps"
            )
        if self.warmup >= self.steps and self.warmup:
            raise ValueError(f"warmup {self.warmup}: must be shorter than steps {self.steps}")
        if self.ema_start > self.steps:
            raise ValueError(
                f"ema_start {self.ema_start}: beyond the stage's {self.steps} steps, so there "
                "would be no average"
            )
        if self.final_lr and self.schedule == "constant":
            raise ValueError(
                f"final_lr {self.final_lr} with schedule constant: set schedule cosine"
            )
        if self.ema_start and self.ema is None:
            raise ValueError(f"ema_start {self.ema_start} without ema: give a decay, e.g. 0.9999")
        if isinstance(self.ema, list) and len(self.averages()) < len(self.ema):
            raise ValueError(f"ema {', '.join(self.averages())}: one of them is there twice")
        return self

    def scheme(self) -> Scheme:
        """The masking scheme with its settings.

        Raises:
            ValueError: settings that do not fit each other.
        """
        settings = {"mask_block": self.mask_block, "tread_blocks": self.tread_blocks}
        return make_scheme(self.mask, settings)

    def averages(self) -> dict[str, float | Power]:
        """The averages of the weights by name, which is also part of their files' names."""
        profiles = self.ema if isinstance(self.ema, list) else [self.ema]
        return {
            f"power-{profile.power}" if isinstance(profile, Power) else str(profile): profile
            for profile in profiles
            if profile is not None
        }


class Logging(Section):
    every: Positive = 10.0  # seconds between progress lines where there is no terminal
    every_steps: Count = 10  # steps between what loggers get; metrics.jsonl has every step
    to: list[Literal["tensorboard", "wandb", "mlflow"]] = []


class Checkpoint(Section):
    keep: Count = 1  # of each unfinished stage; a finished one keeps its last
    remote: str = ""  # folder or s3://, gs:// URL for copies; a start with less goes on from there


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
    init_from: str = ""  # run folder or weights file to start from; default: random weights
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
    stages: dict[Annotated[str, Field(pattern=STAGE_NAME)], Stage]

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.stage and self.stage not in self.stages:
            near = nearest(self.stage, self.stages) or f"; stages: {', '.join(self.stages)}"
            raise ValueError(f"stage {self.stage}: no such stage{near}")
        first, stage = next(iter(self.stages.items()))
        if stage.keep_moments:
            raise ValueError(f"stages.{first}.keep_moments: no stage before has moments; remove it")
        if self.edm is not None and self.objective != "edm":
            raise ValueError(f"edm: not read by objective {self.objective}; remove the section")
        for name, stage in self.stages.items():
            for objective, keys in NOISE.items():
                for key in keys:
                    if (getattr(stage, key) is None) == (objective == self.objective):
                        raise ValueError(f"stages.{name}.{key}: {self._why_not(key)}")
        return self

    def _why_not(self, key: str) -> str:
        own = NOISE[self.objective]
        if key in own:
            return f"objective {self.objective} needs a number; its default is {own[key]:g}"
        return f"not read by objective {self.objective}, which reads {', '.join(own)}"

    def objective_settings(self, stage: Stage) -> dict[str, float]:
        """The fields of the objective's dataclass at a stage."""
        shared = self.edm.model_dump() if self.edm else {}
        return shared | {key: getattr(stage, key) for key in NOISE[self.objective]}

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

    A file that says `base: OTHER.yaml` states only what differs from that file, which lies relative
    to it; mappings are merged key by key, anything else is replaced.

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
    return resolve(_read(Path(files[0]), [a for a in arguments if "=" in a]))


def resolve(raw: dict[str, Any]) -> Config:
    """A nested mapping as a YAML file holds it -> the config, each stage completed by `defaults`,
    then by what the objective and `fidelity` imply.

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
    objective = raw.setdefault("objective", "edm")
    noise = NOISE.get(objective, {}) if isinstance(objective, str) else {}
    own = {str(k): _mapping(v, f"stages.{k}") for k, v in stages.items()}
    raw["stages"] = {name: {**noise, **defaults, **stage} for name, stage in own.items()}
    if objective == "edm":
        raw["edm"] = _mapping(raw.get("edm"), "edm")
    if raw.get("fidelity") == "released":
        raw["optimizer"] = _mapping(raw.get("optimizer"), "optimizer") | {"expert_lr": 1.0}
        for stage in raw["stages"].values():
            stage.update(ema=None, ema_start=0)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise SettingError(_lines(error.errors(), [])) from error


def _read(path: Path, overrides: list[str]) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = _file(path, ())
    _known_stages(overrides, [str(key) for key in _mapping(file.get("stages"), "stages")])
    try:
        changes = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
        result = OmegaConf.to_container(OmegaConf.create(_merged(file, changes)), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise SettingError(f"{path}: {' '.join(str(error).split())}") from error
    return {str(key): value for key, value in result.items()}  # pyright: ignore


def _file(path: Path, above: tuple[Path, ...]) -> dict[Any, Any]:
    """What a file says, on top of what its base says. `above`: the files whose base it is."""
    import yaml
    from omegaconf import OmegaConf

    shown = " -> ".join(map(str, (*above, path)))
    if path.resolve() in [other.resolve() for other in above]:
        raise SettingError(f"base: {shown}: a file cannot be its own base; remove one of them")
    try:
        file = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise SettingError(f"{shown}: {error.strerror}{near}") from error
    except yaml.YAMLError as error:
        raise SettingError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(file, dict):
        raise SettingError(f"{path}: expected a mapping of settings, found a list")
    if "base" not in file:
        return file
    base = file.pop("base")
    if not isinstance(base, str):
        raise SettingError(f"{path}: base={base!r}: give one YAML file, relative to this one")
    return _merged(_file(path.parent / base, (*above, path)), file)


def _merged(base: Any, change: Any) -> Any:
    # OmegaConf's own merge refuses to put a mapping in the place of a list.
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    return base | {key: _merged(base.get(key), value) for key, value in change.items()}


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
        return f"{key}: {error['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    shown = repr(error["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = f"{key}={shown}: {error['msg'][0].lower()}{error['msg'][1:]}"
    if error["type"] == "literal_error":
        message += nearest(str(error["input"]), re.findall("'(.*?)'", error["msg"]))
    return message


def _suggest(path: list[str]) -> str:
    """The key that was probably meant: of this section, or of the same name in another one."""
    *section, word = [part for part in path if not part.isdigit()]  # places in a list
    known = _keys()
    siblings = {k[-1] for k in known if len(k) == len(section) + 1 and _matches(k[:-1], section)}
    elsewhere = [k for k in known if k[-1] == word and k[0] != "stages"]
    if elsewhere:
        return f'; did you mean "{".".join(min(elsewhere, key=len))}"?'
    return nearest(word, siblings) or f"; known: {', '.join(sorted(siblings))}"


def _matches(pattern: Sequence[str], section: Sequence[str]) -> bool:
    return all(p in ("*", s) for p, s in zip(pattern, section, strict=True))


def _keys() -> list[tuple[str, ...]]:
    """Every key there is, as a path; "*" stands for the name of a stage."""
    paths: list[tuple[str, ...]] = [("defaults",)]
    for name, field in Config.model_fields.items():
        paths.append((name,))
        inner = _keys_of(field.annotation)
        if get_origin(field.annotation) is dict:
            paths += [("defaults", *path) for path in inner]
            paths += [(name, "*", *path) for path in inner]
        else:
            paths += [(name, *path) for path in inner]
    return paths


def _keys_of(annotation: Any) -> list[tuple[str, ...]]:
    """The keys of all sections that a type is made of, and of the sections in them."""
    if isinstance(annotation, type) and issubclass(annotation, Section | RatioSchedule):
        return [
            path
            for key, field in annotation.model_fields.items()
            for name in [field.alias or key]
            for path in [(name,), *((name, *inner) for inner in _keys_of(field.annotation))]
        ]
    return [path for part in get_args(annotation) for path in _keys_of(part)]

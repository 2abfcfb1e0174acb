"""The settings of a stage of training, and what sections are made of. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    create_model,
    model_validator,
)

from training.masking.ratio import Ratio, RatioSchedule
from training.masking.scheme import Scheme, make_scheme, stage_settings

STAGE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # a stage's name is a folder's name

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
_SCHEDULE = (dict, RatioSchedule)


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
    """Strict: "1e-3" in quotes is no number, nor is .nan, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# Objective -> the settings of a stage that it alone reads, with their defaults: how noise levels
# are drawn in training, and flow's shift of them.
NOISE: dict[str, dict[str, float]] = {
    "edm": {"p_mean": -0.6, "p_std": 1.2},
    "flow": {"logit_mean": 0.0, "logit_std": 1.0, "shift": 1.0},
}


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


def _optional(kind: Any) -> Any:
    if get_origin(kind) is tuple:  # YAML has lists
        kind = Annotated[kind, Field(strict=False)]
    return kind | None


SCHEME_SETTINGS = stage_settings()
# Those of all masking schemes; `StageSettings.scheme` says which belong together.
_SchemeSettings = create_model(
    "_SchemeSettings",
    __base__=Section,
    **{name: (_optional(kind), None) for name, kind in SCHEME_SETTINGS.items()},  # pyright: ignore
)


class StageSettings(_SchemeSettings):  # pyright: ignore
    """One stretch of training with its own loader and schedule. Steps count from its own start."""

    steps: Count
    resolution: Count  # side of the pictures, pixels
    batch_size: Count  # over all ranks
    lr: Positive
    sources: Sources | None = None  # default: data.sources
    microbatch: Count | None = None  # samples a rank computes at once; default: all of its share
    mask: str = "none"  # a scheme of training.masking, whose settings are the stage's as well
    mask_ratio: MaskRatio = 0.0  # share of patches that are masked
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
    def _check(self) -> StageSettings:
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
        return make_scheme(self.mask, {name: getattr(self, name) for name in SCHEME_SETTINGS})

    def averages(self) -> dict[str, float | Power]:
        """The averages of the weights by name, which is also part of their files' names."""
        profiles = self.ema if isinstance(self.ema, list) else [self.ema]
        return {
            f"power-{profile.power}" if isinstance(profile, Power) else str(profile): profile
            for profile in profiles
            if profile is not None
        }

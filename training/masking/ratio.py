"""How large a share of the tokens is masked: a number, or a function of the step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Ratio = Annotated[float, Field(ge=0, lt=1)]


class RatioSchedule(BaseModel):
    """A share that goes from one value to another in equal jumps, then stays.

    In jumps, because every number of kept tokens is a shape of its own: with torch.compile, a graph
    of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True)

    start: Ratio = Field(alias="from")
    to: Ratio
    steps: Annotated[int, Field(ge=1)]  # of the stage; ``to`` from there on
    shape: Literal["linear", "cosine"] = "linear"
    levels: Annotated[int, Field(ge=2, le=64)] = 8  # distinct shares, both ends included

    @model_validator(mode="after")
    def _check(self) -> RatioSchedule:
        if self.start == self.to:
            raise ValueError(f"from {self.start:g} to {self.to:g}: give the number alone")
        if self.levels > self.steps:
            raise ValueError(f"levels {self.levels}: at most one a step, steps is {self.steps}")
        return self

    def at(self, step: int) -> float:
        """The share at a step of the stage, counted from 0."""
        if self.shape == "linear":
            level = step * self.levels // self.steps
        else:
            level = int(self.levels * (1 - math.cos(math.pi * min(step / self.steps, 1))) / 2)
        if level >= self.levels - 1:
            return self.to
        return self.start + (self.to - self.start) * level / (self.levels - 1)


def ratio_at(ratio: float | RatioSchedule, step: int) -> float:
    """The share at a step of the stage, counted from 0."""
    return ratio.at(step) if isinstance(ratio, RatioSchedule) else ratio


def ratio_steps(ratio: float | RatioSchedule, steps: int) -> dict[float, int]:
    """How many of a stage's steps have which share."""
    if not isinstance(ratio, RatioSchedule):
        return {ratio: steps}
    counts: dict[float, int] = {}
    for step in range(min(steps, ratio.steps)):
        share = ratio.at(step)
        counts[share] = counts.get(share, 0) + 1
    if steps > ratio.steps:
        counts[ratio.to] = counts.get(ratio.to, 0) + steps - ratio.steps
    return counts

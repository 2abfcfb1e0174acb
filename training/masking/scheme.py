"""What a masking scheme says: how many tokens are kept, which, and where the others leave."""

from __future__ import annotations

import dataclasses
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from pipeline.core.errors import nearest
from training.masking import MASKS

if TYPE_CHECKING:
    from torch import Tensor

    from training.network.config import DiTConfig
    from training.network.tokens import ExtraLoss, Skips, TokenMask


@dataclass(frozen=True)
class Scheme:
    """A masking scheme with its settings: what differs from deferred masking of single tokens.

    A field of a scheme is a stage's setting of that name and type. One without a default has an
    "example" in its metadata, and has to be given.
    """

    @property
    def skips(self) -> Skips:
        """Where the tokens that are not kept leave the network, and whether they rejoin."""
        return "backbone"

    def check(self, config: DiTConfig) -> None:
        """That this network can be trained with the scheme.

        Raises:
            ValueError: what the network lacks.
        """
        return

    def extra_loss(self) -> ExtraLoss | None:
        """A further term of each sample's loss, where tokens are dropped."""
        return None

    def kept(self, tokens: int, ratio: float) -> int:
        """How many of an image's ``tokens`` are kept, the same number in every sample.

        Raises:
            ValueError: ``ratio`` outside [0, 1), or nothing is kept.
        """
        return kept_tokens(tokens, ratio)

    def draw(self, noise: Tensor, ratio: float) -> TokenMask | None:
        """Which tokens of each sample are kept: those with the smallest noise.

        Args:
            noise: uniform on [0, 1), float (B, T). It comes from the caller, because randomness in
                this project is a function of (seed, step) or (seed, sample).
            ratio: share of tokens that are not kept, in [0, 1).

        Returns:
            The mask, or None where all are kept.

        Raises:
            ValueError: as `kept`.
        """
        from training.network.tokens import keep_smallest

        return keep_smallest(noise, self.kept(noise.shape[1], ratio), self.skips)


def kept_tokens(tokens: int, ratio: float, unit: str = "patches") -> int:
    """How many of ``tokens`` a mask of ``ratio`` keeps: floor(tokens * (1 - ratio)).

    Raises:
        ValueError: ``ratio`` outside [0, 1), or so high that nothing is kept.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"mask_ratio {ratio:g}: choose a share of dropped tokens in [0, 1)")
    # The floor is of the decimal number meant, not of its binary neighbour: 10 tokens at 0.9
    # are 0.9999999999999998 in floating point and 1 in intent.
    keep = math.floor(tokens * (1 - ratio) + 1e-9)
    if keep == 0:
        raise ValueError(
            f"mask_ratio {ratio:g}: keeps none of {tokens} {unit}; at most {1 - 1 / tokens:g}"
        )
    return keep


def stage_settings() -> dict[str, Any]:
    """Setting -> its type, of all schemes of the table: what a stage may say beside `mask`.

    Raises:
        TypeError: two schemes have a setting of the same name and of different types.
    """
    types: dict[str, Any] = {}
    for path in MASKS.values():
        kind = pkgutil.resolve_name(path)
        hints = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            if types.setdefault(field.name, hints[field.name]) != hints[field.name]:
                raise TypeError(f"{path}: {field.name} has another type in another scheme")
    return types


def make_scheme(name: str, settings: Mapping[str, Any] | None = None) -> Scheme:
    """The scheme of that name with its settings; those that are None count as not given.

    Raises:
        ValueError: no such scheme, a setting that it needs or does not read, or a wrong value.
    """
    if name not in MASKS:
        raise ValueError(f"mask {name}: unknown{nearest(name, MASKS)}; known: {', '.join(MASKS)}")
    kind = pkgutil.resolve_name(MASKS[name])
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in given.items():
        if key not in fields:
            raise ValueError(f"{key} {value} with mask {name}, which has no use for it: remove it")
    for key, field in fields.items():
        if key not in given and field.default is dataclasses.MISSING:
            example = field.metadata["example"]
            example = list(example) if isinstance(example, tuple) else example  # as YAML has it
            raise ValueError(f"mask {name} without {key}: give one, e.g. {key}: {example}")
    return kind(**given)

"""Deferred masking of square cells of patches (ablation of MicroDiT, arXiv 2407.15811)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from training.masking.scheme import Scheme, kept_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from training.network.tokens import TokenMask


@dataclass(frozen=True)
class Block(Scheme):
    """Tokens are dropped after the patch-mixer in whole cells of b x b neighbours."""

    mask_block: Literal[2, 4, 8] = field(metadata={"example": 2})
    """b, the cells' side in patches: a divisor of the grid's side."""

    def kept(self, tokens: int, ratio: float) -> int:
        """Tokens in floor(cells * (1 - ratio)) cells.

        Raises:
            ValueError: ``ratio`` outside [0, 1), or no cell is kept, or cells do not tile the grid.
        """
        b, grid = self.mask_block, math.isqrt(tokens)
        if grid % b:
            raise ValueError(
                f"mask_block {b}: does not divide the {grid} x {grid} patches of an image; "
                f"choose a divisor of {grid}"
            )
        return kept_tokens((grid // b) ** 2, ratio, "cells") * b * b

    def draw(self, noise: Tensor, ratio: float) -> TokenMask | None:
        """As every scheme, with one number a cell: that of its first token."""
        from training.network.tokens import keep_smallest

        tokens, b = noise.shape[1], self.mask_block
        keep, grid = self.kept(tokens, ratio), math.isqrt(tokens)
        cells = noise.unflatten(1, (grid, grid))[:, ::b, ::b].flatten(1)
        # Ranks, not noise: two cells with the same number would share the last places.
        rank = cells.argsort(dim=1, stable=True).argsort(dim=1)
        rank = rank.unflatten(1, (grid // b, grid // b))
        rank = rank.repeat_interleave(b, dim=1).repeat_interleave(b, dim=2).flatten(1)
        return keep_smallest(rank, keep, self.skips)

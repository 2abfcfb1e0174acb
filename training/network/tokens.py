"""A drawn token mask, and how tokens are taken out and put back with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Skips = Literal["network", "backbone"] | tuple[int, int]
"""What the tokens that are not kept do not pass through: everything after the patch embedding; the
backbone, after the patch-mixer has seen them; or the backbone's blocks first to last, after which
they are back in their places."""

ExtraLoss = Callable[[Tensor, Tensor, "TokenMask"], Tensor]
"""(noisy latents (B, C, S, S), denoised latents (B, C, S, S), mask) -> (B,), added to the loss."""


@dataclass(frozen=True)
class TokenMask:
    """Which of T tokens are kept in each of B samples; every sample keeps the same number K."""

    ids_keep: Tensor
    """int64 (B, K): kept positions, in the order the network sees them."""
    ids_restore: Tensor
    """int64 (B, T): where each position lies in [kept, others]; inverts the shuffle."""
    mask: Tensor
    """float32 (B, T): 1 where a patch is lost and has no loss, 0 where it counts."""
    skips: Skips = "backbone"
    """What the tokens that are not kept do not pass through."""

    def keep(self, x: Tensor) -> Tensor:
        """Tokens x (B, T, d) -> the kept ones (B, K, d)."""
        return _take(x, self.ids_keep)

    def restore(self, x: Tensor, fill: Tensor) -> Tensor:
        """Kept tokens x (B, K, d) -> (B, T, d), with ``fill`` (1, 1, d) in the other places."""
        batch, tokens = self.ids_restore.shape
        others = fill.expand(batch, tokens - x.shape[1], -1).to(x.dtype)
        return _take(torch.cat((x, others), dim=1), self.ids_restore)

    def rejoin(self, x: Tensor, bypassed: Tensor) -> Tensor:
        """Kept tokens x (B, K, d) back into their places among all tokens (B, T, d)."""
        rows = _rows(self.ids_keep, bypassed)
        merged = bypassed.flatten(0, 1).index_copy(0, rows, x.flatten(0, 1).to(bypassed.dtype))
        return merged.view_as(bypassed)


def keep_smallest(order_by: Tensor, keep: int, skips: Skips) -> TokenMask | None:
    """A mask that keeps the ``keep`` tokens of each sample with the smallest number.

    Args:
        order_by: a number a token, (B, T). Ties fall to the first token, on every device alike.

    Returns:
        The mask, kept tokens in the order of their numbers, or None where all are kept. Where
        tokens rejoin, all of them count in the loss.
    """
    tokens = order_by.shape[1]
    if keep == tokens:
        return None
    order = order_by.argsort(dim=1, stable=True)
    place = torch.arange(tokens, device=order.device).expand_as(order)
    ids_restore = torch.empty_like(order).scatter_(1, order, place)
    lost = (ids_restore >= keep).float() if isinstance(skips, str) else torch.zeros_like(order_by)
    return TokenMask(order[:, :keep], ids_restore, lost, skips)


def _take(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens x (B, T, d) at positions ids (B, K) -> (B, K, d)."""
    return x.flatten(0, 1).index_select(0, _rows(ids, x)).view(*ids.shape, x.shape[2])


def _rows(ids: Tensor, x: Tensor) -> Tensor:
    # Whole rows of the flattened batch: the index stays (B, K) instead of growing to (B, K, d),
    # and both directions copy contiguous rows.
    batch, tokens, _ = x.shape
    first = torch.arange(0, batch * tokens, tokens, device=x.device)
    return (ids + first[:, None]).flatten()

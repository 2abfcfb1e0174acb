"""A drawn token mask, and how tokens are dropped and put back with it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMask:
    """Which of T tokens are kept in each of B samples; every sample keeps the same number K."""

    ids_keep: Tensor
    """int64 (B, K): kept positions, in the order the backbone sees them."""
    ids_restore: Tensor
    """int64 (B, T): where each position lies in [kept, dropped]; inverts the shuffle."""
    mask: Tensor
    """float32 (B, T): 1 where a token is dropped, 0 where it is kept."""

    def keep(self, x: Tensor) -> Tensor:
        """Tokens x (B, T, d) -> the kept ones (B, K, d)."""
        return _take(x, self.ids_keep)

    def restore(self, x: Tensor, fill: Tensor) -> Tensor:
        """Kept tokens x (B, K, d) -> (B, T, d), with ``fill`` (1, 1, d) in dropped places."""
        batch, tokens = self.ids_restore.shape
        dropped = fill.expand(batch, tokens - x.shape[1], -1).to(x.dtype)
        return _take(torch.cat((x, dropped), dim=1), self.ids_restore)


def keep_all(noise: Tensor, ratio: float) -> None:
    """The scheme that never masks.

    Raises:
        ValueError: ``ratio`` is not 0.
    """
    if ratio != 0:
        raise ValueError(f"mask ratio {ratio} with scheme 'none': set ratio 0 or name a scheme")


def _take(x: Tensor, ids: Tensor) -> Tensor:
    # Whole rows of the flattened batch: the index stays (B, K) instead of growing to (B, K, d),
    # and both directions copy contiguous rows.
    batch, tokens, width = x.shape
    first = torch.arange(0, batch * tokens, tokens, device=x.device)
    rows = (ids + first[:, None]).flatten()
    return x.flatten(0, 1).index_select(0, rows).view(batch, ids.shape[1], width)

"""Deferred masking's random token mask (MicroDiT, arXiv 2407.15811): uniform per patch.

"Deferred" is where the model applies it: after the patch-mixer has seen all tokens.
"""

import math

import torch
from torch import Tensor

from training.masking.tokens import TokenMask


def kept_tokens(tokens: int, ratio: float) -> int:
    """How many of ``tokens`` a mask of ``ratio`` keeps: floor(tokens * (1 - ratio)).

    Raises:
        ValueError: ``ratio`` outside [0, 1), or so high that nothing is kept.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {ratio}: choose a share of dropped tokens in [0, 1)")
    # The floor is of the decimal number meant, not of its binary neighbour: 10 tokens at 0.9
    # are 0.9999999999999998 in floating point and 1 in intent.
    keep = math.floor(tokens * (1 - ratio) + 1e-9)
    if keep == 0:
        raise ValueError(
            f"mask ratio {ratio}: keeps none of {tokens} tokens, choose at most {1 - 1 / tokens:g}"
        )
    return keep


def draw(noise: Tensor, ratio: float) -> TokenMask | None:
    """Keep the tokens with the smallest noise, independently for each sample.

    Args:
        noise: uniform on [0, 1), float (B, T).
        ratio: share of tokens to drop, in [0, 1).

    Returns:
        The mask, kept tokens ordered by their noise, or None where nothing is dropped.

    Raises:
        ValueError: ``ratio`` outside [0, 1), or so high that nothing is kept.
    """
    tokens = noise.shape[1]
    keep = kept_tokens(tokens, ratio)
    if keep == tokens:
        return None
    order = noise.argsort(dim=1, stable=True)  # stable: ties fall the same way on every device
    place = torch.arange(tokens, device=noise.device).expand_as(order)
    ids_restore = torch.empty_like(order).scatter_(1, order, place)
    return TokenMask(order[:, :keep], ids_restore, (ids_restore >= keep).float())

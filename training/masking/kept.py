"""How many tokens a share keeps, exactly."""

import math


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

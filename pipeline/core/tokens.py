"""Token vectors as eight-bit integers with a float16 scale for every 64 dimensions.

A scale a token is not enough: the final layer norm of a CLIP has dimensions that stand far out, and
one such sets the step of all the others. Lowest cosine to the float16 vector (W: width):

    scale for every                  token   256       128       64        32 dimensions
    tiny-clip, real captions, W 128  0.99995 0.99995   0.99995   0.99996   0.99998
    DFN5B tower, random weights      0.99995 0.99996   0.99997   0.99998   0.99998
      with 3 outliers in its norm    0.99819 0.99949   0.99974   0.99986   0.99993
    Gaussian, W 1024                 0.99993 0.99996   0.99997   0.99998   0.99998
    one dimension at 30 rms, W 1024  0.99861 0.99962   0.99979   0.99988   0.99993
    three at 30 rms, W 1024          0.99930 0.99947   0.99971   0.99985   0.99992
    one at 100 rms, W 1024           0.99739 0.99929   0.99963   0.99978   0.99989
    any vector at all (a bound)      -       0.9980    0.9990    0.9995    0.9997

64 is the coarsest whose bound is 0.9995: a step is 1/127 of the block's largest value m, so the
squares of its 64 errors of at most half a step come to at most 64 (m/254)^2 = 0.00099 m^2, and
those of the block to m^2 or more. It costs 2 bytes in 64, 3 %. (The bound is for vectors of a layer
norm's size; float16 holds the scales less well where the largest value is below 0.01.)

Fewer bits do not reach it: six, with a scale for every 16 dimensions (7 bits a number, 15 % less),
come down to 0.9991 with outliers and to 0.9997 on tiny-clip; four to 0.990 and 0.994.
"""

from __future__ import annotations

import numpy as np

BLOCK = 64  # dimensions that share a scale
STEPS = 127  # of either sign
LARGEST = 512.0 * STEPS  # 65,024: what float16 can hold after rounding up


def quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token vectors in eight bits.

    Args:
        rows: float (L, W), L and W of 1 or more.

    Returns:
        int8 (L, W), and the scales, float16 (L, W / 64), rounded up to a whole number of blocks.

    Raises:
        ValueError: a value is not finite, or beyond 65,024.
    """
    length, width = rows.shape
    blocks = -(-width // BLOCK)
    padded = np.zeros((length, blocks * BLOCK), np.float32)
    padded[:, :width] = rows
    padded = padded.reshape(length, blocks, BLOCK)
    largest = np.abs(padded).max(axis=2)
    if not (largest <= LARGEST).all():  # NaN compares as False
        raise ValueError(f"a token vector has a value that is not finite or beyond {LARGEST:,.0f}")
    wanted = largest / STEPS
    scales = wanted.astype(np.float16)
    # Rounded up, so that the largest value is at most 127 steps.
    scales = np.where(scales < wanted, np.nextafter(scales, np.float16(np.inf)), scales)
    steps = np.where(scales > 0, scales, 1).astype(np.float32)[:, :, None]
    values = np.rint(padded / steps).astype(np.int8)
    return values.reshape(length, -1)[:, :width].copy(), scales


def dequantise(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int8 (L, W) and their scales, float16 (L, W / 64) -> float16 (L, W)."""
    import torch  # rounds to float16 ten times as fast as numpy

    length, width = values.shape
    steps = scales.astype(np.float32)[:, :, None]
    if width % BLOCK:
        steps = np.broadcast_to(steps, (length, steps.shape[1], BLOCK))
        products = values * steps.reshape(length, -1)[:, :width]
    else:
        products = values.reshape(length, -1, BLOCK) * steps
    return torch.from_numpy(products).half().numpy().reshape(length, width)


def row_bytes(width: int, dtype: str) -> int:
    """Bytes of one stored token vector, "int8" with its scales."""
    if dtype == "int8":
        return width + 2 * -(-width // BLOCK)
    return width * np.dtype(dtype).itemsize

"""The official MicroDiT code's single MDS: its columns, and its numbers to and from ours.

    caption           str
    caption_latents   bytes   fp16 (1, length, width), row-major: (1, 77, 1024)
    latents_256       bytes   fp16 (C, 32, 32), scaled already: raw · scale
    latents_512       bytes   fp16 (C, 64, 64), the same

The official code knows no shift, neither when it encodes nor when it decodes: what it calls a
latent is the raw one times the VAE's scale, whatever shift the VAE's config has.

Column groups hold raw latents, and fp16 rounds twice on the way there and back: of the values of
SDXL's latents 4 % come back one unit in the last place (ulp) off, which is what fp16 storage costs
anyway. `from_official` gives what makes the way back exact, in about 3 % of a latent's bytes.
"""

from __future__ import annotations

import re

import numpy as np

from pipeline.core.manifest import TextFacts, VaeFacts

CAPTION = "caption"
TOKENS = "caption_latents"
DTYPE = "float16"  # of every array
CORRECTIONS = "corrections"  # column of a latents group's parquet of keys


def form(vae: VaeFacts) -> dict[str, str]:
    """What inputs say of a shard that is exported or imported, where it makes a difference: earlier
    releases applied the shift as well."""
    return {"official_form": "raw times scale, no shift"} if vae.shift else {}


def latents_column(resolution: int) -> str:
    return f"latents_{resolution}"


def columns(resolutions: list[int]) -> dict[str, str]:
    """Name -> MDS encoding."""
    return {CAPTION: "str", TOKENS: "bytes"} | {latents_column(r): "bytes" for r in resolutions}


def sizes(resolutions: list[int], vae: VaeFacts, text: TextFacts) -> dict[str, int]:
    """Bytes of a sample in each column of numbers."""
    sides = {latents_column(r): r // vae.downsample for r in resolutions}
    latents = {name: 2 * vae.channels * side * side for name, side in sides.items()}
    return {TOKENS: 2 * text.length * text.width, **latents}


def resolutions_of(names: list[str]) -> list[int]:
    """Sides in pixels of the latents columns among these names, ascending."""
    found = (re.fullmatch(r"latents_([1-9]\d*)", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def to_official(raw: np.ndarray, vae: VaeFacts, correction: bytes = b"") -> np.ndarray:
    """Stored raw latent -> the official code's, float16 of the same shape.

    Args:
        raw: mean or sample, any shape; infinite in the result where fp16 cannot hold it.
        correction: of `from_official`, for a latent that came from there: the result is then the
            official one to the bit.
    """
    with np.errstate(over="ignore"):
        scaled = (raw.astype(np.float32) * vae.scale).astype(DTYPE)
    if correction:
        bits = scaled.view(np.uint16).reshape(-1)
        mask_bytes = (bits.size + 7) // 8
        mask = np.unpackbits(np.frombuffer(correction, np.uint8, mask_bytes), count=bits.size)
        bits[mask.astype(bool)] += np.frombuffer(correction, "<u2", offset=mask_bytes)
    return scaled


def from_official(scaled: np.ndarray, vae: VaeFacts) -> tuple[np.ndarray, bytes]:
    """The official code's latent -> raw float16 of the same shape, and what it lost.

    Returns:
        The raw latent, infinite where fp16 cannot hold it; and the correction for `to_official`:
        a bit for each value, set where the way back misses it, then the missing distances in ulps
        (uint16, modulo 65536). Empty where the way back is exact.
    """
    with np.errstate(over="ignore"):
        raw = (scaled.astype(np.float32) / vae.scale).astype(DTYPE)
    distance = scaled.view(np.uint16) - to_official(raw, vae).view(np.uint16)
    missed = distance != 0
    if not missed.any():
        return raw, b""
    return raw, np.packbits(missed).tobytes() + distance[missed].astype("<u2").tobytes()

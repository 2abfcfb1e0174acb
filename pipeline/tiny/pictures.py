"""Training pictures for the tiny encoders: every OpenMoji, composited on the fly."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import torch
from PIL import Image

from pipeline.sources.openmoji import STARTER, codes, render


def glyph_split(name: str) -> str:
    """ "test" for one glyph in sixteen: never seen in training, what the reported scores are on.

    The demo's glyphs are always "train": its judge has to know them, on their training pairs.
    """
    if name in STARTER:
        return "train"
    return "test" if hashlib.sha256(b"tiny" + name.encode()).digest()[0] < 16 else "train"


def sheet(names: list[str], size: int) -> torch.Tensor:
    """Renders of `names`, (N, size, size, 4) uint8 RGBA, transparent background."""
    rows = [np.asarray(Image.open(io.BytesIO(render(n, size, None)))) for n in names]
    return torch.from_numpy(np.stack(rows))


def composite(rgba: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 4) uint8 over (B, 3) colours in 0..255 -> (B, 3, H, W) float in [-1, 1].

    resvg's PNGs carry straight (not premultiplied) alpha.
    """
    x = rgba.permute(0, 3, 1, 2).float()
    alpha = x[:, 3:] / 255
    mixed = x[:, :3] * alpha + background[:, :, None, None] * (1 - alpha)
    return mixed / 127.5 - 1


def all_names() -> list[str]:
    """Every named OpenMoji, sorted."""
    return list(codes())

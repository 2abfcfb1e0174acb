"""Decode, resize, crop: pure functions from encoded bytes to the pixels an encoder sees."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 120_000_000  # larger headers are refused before a pixel is decoded


class BadPicture(Exception):
    """A picture that cannot be used: `reason` groups it, the message says what happened."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def decode(data: bytes) -> Image.Image:
    """Encoded bytes to an upright RGB picture; transparency is flattened on white.

    Raises:
        BadPicture: "undecodable" or "too-large".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadPicture("too-large", f"{image.width}x{image.height} pixels")
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except BadPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture("too-large", str(error)) from error
    except Exception as error:  # Pillow's decoders raise whatever their C libraries make of a file
        raise BadPicture("undecodable", f"{type(error).__name__}: {error}") from error


def fit(image: Image.Image, resolution: int, crop: str = "center") -> np.ndarray:
    """Shorter side to `resolution` (bicubic, antialiased), then the central square.

    Returns:
        (resolution, resolution, 3) uint8.

    Raises:
        BadPicture: "too-small", where the picture would have to be enlarged.
    """
    if crop != "center":
        raise ValueError(f"crop={crop!r}: only 'center' is built")
    width, height = image.size
    shorter = min(width, height)
    if shorter < resolution:
        raise BadPicture("too-small", f"{width}x{height}, needs {resolution} on the shorter side")
    if shorter > resolution:
        scale = resolution / shorter
        size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    # A copy: torch warns of Pillow's read-only buffers.
    return np.array(image.crop((left, top, left + resolution, top + resolution)))

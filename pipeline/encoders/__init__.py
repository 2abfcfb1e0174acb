"""Images and text to tensors and back: every encoder is asked for here, by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.encoders.table import (
    TEXT_ENCODERS,
    VAES,
    WEIGHTS_SHA256,
    find_text,
    find_vae,
    locate_text,
    locate_vae,
    public_repo,
    text_facts,
    vae_facts,
)

if TYPE_CHECKING:
    from pipeline.encoders.autoencoder import ImageEncoder
    from pipeline.encoders.text import TextEncoder

__all__ = [
    "TEXT_ENCODERS",
    "VAES",
    "WEIGHTS_SHA256",
    "find_text",
    "find_vae",
    "load_text",
    "load_vae",
    "locate_text",
    "locate_vae",
    "public_repo",
    "text_facts",
    "vae_facts",
]


def load_vae(name: str, device: str = "cpu", dtype: str = "float32") -> ImageEncoder:
    """`autoencoder.load_vae`, imported on use: the tables above must stay free of torch."""
    from pipeline.encoders.autoencoder import load_vae

    return load_vae(name, device, dtype)


def load_text(
    name: str, device: str = "cpu", dtype: str = "float32", images: bool = False
) -> TextEncoder:
    """`text.load_text`, imported on use: the tables above must stay free of torch."""
    from pipeline.encoders.text import load_text

    return load_text(name, device, dtype, images)

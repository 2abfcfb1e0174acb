"""Stored form of a latent <-> the form the model sees.

Stored is raw: what the VAE's posterior gave. Shift and scale are applied here and nowhere else.
"""

from __future__ import annotations

from typing import TypeVar

from pipeline.core.manifest import VaeFacts

Array = TypeVar("Array")  # numpy array or torch tensor, any shape


def to_model(raw: Array, vae: VaeFacts) -> Array:
    """Raw latent -> zero-mean, about unit-variance latent that the diffusion model trains on."""
    return (raw - vae.shift) * vae.scale  # pyright: ignore


def to_raw(latent: Array, vae: VaeFacts) -> Array:
    """The inverse of `to_model`: what the VAE's decoder takes."""
    return latent / vae.scale + vae.shift  # pyright: ignore

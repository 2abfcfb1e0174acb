"""Stored form of a latent <-> the form the model sees.

Stored is raw: what the VAE's posterior gave. Shift and scale are applied here and nowhere else.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np

from pipeline.core.manifest import VaeFacts

Array = TypeVar("Array")  # numpy array or torch tensor, any shape


def to_model(raw: Array, vae: VaeFacts) -> Array:
    """Raw latent -> zero-mean, about unit-variance latent that the diffusion model trains on."""
    return (raw - vae.shift) * vae.scale  # pyright: ignore


def to_raw(latent: Array, vae: VaeFacts) -> Array:
    """The inverse of `to_model`: what the VAE's decoder takes."""
    return latent / vae.scale + vae.shift  # pyright: ignore


def posterior_sample(moments: np.ndarray, *key: int | str) -> np.ndarray:
    """A draw from a VAE's diagonal Gaussian posterior: mean + exp(log variance / 2) noise.

    Args:
        moments: (2C, h, w), mean and log variance, as AutoencoderKL's encoder gives them.
        key: what the noise is a function of, e.g. (seed, sample key, epoch).

    Returns:
        (C, h, w) float32, raw.
    """
    mean, log_variance = np.split(moments.astype(np.float32), 2)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))
    noise = generator.standard_normal(mean.shape, np.float32)
    # diffusers clamps before it exponentiates (DiagonalGaussianDistribution).
    return mean + np.exp(0.5 * log_variance.clip(-30, 20)) * noise

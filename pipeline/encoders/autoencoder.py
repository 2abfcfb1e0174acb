"""Pictures <-> raw latents through any diffusers AutoencoderKL."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from pipeline.core.manifest import VaeFacts
from pipeline.encoders import find_vae


class ImageEncoder:
    """An AutoencoderKL with its facts. Latents are raw: no shift, no scale."""

    def __init__(self, vae: Any, facts: VaeFacts) -> None:
        self.vae = vae
        self.facts = facts

    @torch.no_grad()
    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> posterior mean, (B, C, H/8, W/8) float32."""
        x = torch.from_numpy(pixels).to(self.vae.device).permute(0, 3, 1, 2).to(self.vae.dtype)
        posterior = self.vae.encode(x / 127.5 - 1, return_dict=False)[0]
        return posterior.mean.float().cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Raw latents (B, C, h, w) -> (B, 8h, 8w, 3) uint8."""
        latents = latents.to(self.vae.device, self.vae.dtype)
        x = self.vae.decode(latents, return_dict=False)[0].float()
        x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
        return x.permute(0, 2, 3, 1).cpu().numpy()


def load_vae(name: str, device: str = "cpu") -> ImageEncoder:
    """A VAE of the table, a folder or a hub id, float32.

    Raises:
        SettingError: unknown name, weights not in the cache, or a folder that misses a file.
    """
    facts, folder = find_vae(name)
    vae: Any = AutoencoderKL.from_pretrained(
        folder,
        torch_dtype=torch.float32,
        local_files_only=True,
        low_cpu_mem_usage=False,  # True wants the accelerate package
    )
    return ImageEncoder(vae.to(device).eval().requires_grad_(False), facts)

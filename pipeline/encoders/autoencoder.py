"""Pictures <-> raw latents through any diffusers AutoencoderKL."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import SafetensorError

from pipeline.core.errors import SettingError
from pipeline.core.manifest import VaeFacts
from pipeline.encoders.configs import BROKEN, check_loaded, first_line
from pipeline.encoders.loading import autocast
from pipeline.encoders.table import find_vae


class ImageEncoder:
    """An AutoencoderKL with its facts. Latents are raw: no shift, no scale."""

    def __init__(self, vae: Any, facts: VaeFacts) -> None:
        self.vae = vae
        self.facts = facts
        self._encode = vae.encode

    def compile(self) -> None:
        """Through torch.compile, which takes a minute at the first batch of each size."""
        self._encode = torch.compile(self.vae.encode)

    @torch.no_grad()
    def moments(self, pixels: np.ndarray, exact: bool = False) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> the posterior's mean and log variance, (B, 2C, H/8, W/8) float32.

        Bytes go to the device and are normalised there.

        Args:
            exact: float32, whatever the encoder's own type is.
        """
        device = self.vae.device
        x = torch.from_numpy(pixels)
        if device.type == "cuda":
            x = x.pin_memory().to(device, non_blocking=True)
        # Channels last in memory, as the bytes are: convolutions on GPUs want it so.
        x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
        with autocast(device, "float32" if exact else self.facts.dtype):
            return self._encode(x).latent_dist.parameters.float().cpu()

    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> posterior mean, (B, C, H/8, W/8) float32."""
        return self.moments(pixels).chunk(2, dim=1)[0]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Raw latents (B, C, h, w) -> (B, 8h, 8w, 3) uint8."""
        latents = latents.to(self.vae.device, self.vae.dtype)
        x = self.vae.decode(latents, return_dict=False)[0].float()
        x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
        return x.permute(0, 2, 3, 1).cpu().numpy()


def load_vae(name: str, device: str = "cpu", dtype: str = "float32") -> ImageEncoder:
    """A VAE of the table, a folder or a hub id, with float32 weights.

    Args:
        dtype: what it computes in: float32, or bfloat16 through autocast.

    Raises:
        SettingError: unknown name, weights not in the cache, or a folder that lacks a file or some
            of its weights.
    """
    facts, folder = find_vae(name)
    try:
        loaded: Any = AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            local_files_only=True,
            low_cpu_mem_usage=False,  # True wants the accelerate package
            output_loading_info=True,
        )
    except (SafetensorError, *BROKEN) as error:
        raise SettingError(
            f"vae={name}: {folder} cannot be loaded: its config and its weights do not fit, or are "
            f"broken: {first_line(error)}"
        ) from error
    vae, info = loaded
    if info["missing_keys"]:  # of which diffusers only warns, and leaves random numbers there
        raise SettingError(
            f"vae={name}: {folder} lacks {len(info['missing_keys'])} of its tensors (first: "
            f"{sorted(info['missing_keys'])[0]}); copy its weights anew"
        )
    own = {
        "channels": vae.config.latent_channels,
        "downsample": 2 ** sum(block.downsamplers is not None for block in vae.encoder.down_blocks),
        "scale": vae.config.scaling_factor,
        "shift": vae.config.shift_factor or 0.0,
    }
    check_loaded(f"vae={name}", folder, facts.model_dump(), own)
    if info["unexpected_keys"]:  # another model's config: what it leaves out would be missed
        surplus = sorted(info["unexpected_keys"])
        raise SettingError(
            f"vae={name}: the config in {folder} has no place for {len(surplus)} tensors of its "
            f"weights (first: {surplus[0]}); copy both anew"
        )
    vae = vae.to(device).eval().requires_grad_(False)
    if device != "cpu":
        vae = vae.to(memory_format=torch.channels_last)
    return ImageEncoder(vae, facts.model_copy(update={"dtype": dtype}))

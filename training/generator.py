"""Pictures from prompts: a network with the encoders it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.core.errors import SettingError
from pipeline.core.latents import to_raw
from pipeline.core.manifest import mismatches
from pipeline.encoders import load_text, load_vae
from training.config.sampling_options import device_of
from training.objectives.sampler import Solver, sample
from training.randomness import picture_noise
from training.weights import weights_file

Report = Callable[[int, int], None]
"""Called with (done, total)."""


class Generator:
    """A network with its VAE and text encoder, ready to generate.

    Args:
        checkpoint: a run's folder, or a safetensors file with metadata.
        device: where the network runs, e.g. "cuda"; default: a GPU where there is one.

    Raises:
        SettingError: no such checkpoint or device, or encoders that are not those it was trained
            with.
    """

    def __init__(self, checkpoint: str, device: str = "") -> None:
        path = weights_file.find(checkpoint)
        self.device = device_of(device)
        self.network, self.metadata = weights_file.load(path, str(self.device))
        self.vae = load_vae(self.metadata.vae.name)
        self.text = load_text(self.metadata.text_encoder.name)
        for kind, expected, found in (
            ("vae", self.metadata.vae, self.vae.facts),
            ("text encoder", self.metadata.text_encoder, self.text.facts),
        ):
            # What was imported knows its encoders from the table, which has no hashes.
            unread = () if expected.weights_sha256 else ("weights_sha256",)
            lines = mismatches(expected, found, ignore=("revision", "dtype", *unread))
            if lines:
                raise SettingError(
                    f"{path}: {kind} {expected.name} has changed: {'; '.join(lines)}"
                )

    def generate(
        self,
        prompts: Sequence[str],
        guidance: float = 5.0,
        steps: int = 30,
        seed: int = 0,
        batch_size: int = 16,
        report: Report | None = None,
        solver: Solver = "heun",
    ) -> np.ndarray:
        """One picture a prompt, uint8 (N, H, W, 3).

        Picture i is a function of (seed, i, its prompt), whatever else is asked for.

        Raises:
            SettingError: latents that are no numbers, or a batch that does not fit into memory.
        """
        pictures = []
        batches = [
            range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)
        ]
        for number, indexes in enumerate(batches):
            y, y_mask = self.encode_prompts([prompts[i] for i in indexes])

            def progress(done: int, _: int, before: int = number * steps) -> None:
                if report is not None:
                    report(before + done, len(batches) * steps)

            bf16 = self.device.type == "cuda"
            try:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    latents = sample(
                        self.network,
                        self.metadata.noise(),
                        self._noise(seed, indexes),
                        y,
                        y_mask,
                        steps=steps,
                        guidance=guidance,
                        progress=progress,
                        solver=solver,
                    )
            except torch.OutOfMemoryError as error:
                raise SettingError(
                    f"--batch-size {batch_size}: {len(indexes)} pictures at once do not fit into "
                    f"the memory of {self.device}; give less"
                ) from error
            if not latents.isfinite().all():
                raise SettingError(
                    f"--guidance {guidance:g}: the latents of pictures {indexes[0]} to "
                    f"{indexes[-1]} are no numbers; lower it, or take other weights"
                )
            pictures.append(self.vae.decode(to_raw(latents, self.metadata.vae)))
        return np.concatenate(pictures)

    def encode_prompts(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Captions as training saw them: y (B, L, W), and in a trimmed model their mask (B, L)."""
        tokens, lengths = self.text.encode(prompts)
        tokens = tokens.half().float()  # shards store float16
        if self.metadata.text == "full":
            return tokens.to(self.device), None
        lengths = torch.as_tensor(lengths)
        tokens = tokens[:, : int(lengths.max())]
        y_mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        return (tokens * y_mask[..., None]).to(self.device), y_mask.to(self.device)

    def _noise(self, seed: int, indexes: Sequence[int]) -> torch.Tensor:
        config = self.network.config
        shape = (config.in_channels, config.input_size, config.input_size)
        return picture_noise(seed, indexes, shape).to(self.device)

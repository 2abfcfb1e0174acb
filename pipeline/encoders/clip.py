"""Captions -> token vectors through an open_clip text tower; the whole CLIP for a judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from pipeline.core.manifest import TextFacts
from pipeline.encoders import find_text


class TextEncoder:
    """An open_clip model with its tokenizer and facts."""

    def __init__(self, model: Any, tokenizer: Any, facts: TextFacts) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts = facts
        self.device = next(model.parameters()).device
        # CustomTextCLIP keeps the tower in .text; CLIP is its own text tower.
        self._tower = getattr(model, "text", model)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of the final text layer norm at every position, before pooling and projection.

        Returns:
            tokens (N, L, W) float32; lengths (N,), the rows up to and including end-of-text.
        """
        ids = self.tokenizer(captions).to(self.device)
        tower = self._tower
        x = tower.token_embedding(ids) + tower.positional_embedding
        x = tower.transformer(x, attn_mask=tower.attn_mask)
        # CLIP's convention: end-of-text has the highest id of the vocabulary.
        return tower.ln_final(x).float().cpu(), (ids.argmax(dim=-1) + 1).cpu()

    @torch.no_grad()
    def embed_texts(self, captions: list[str]) -> torch.Tensor:
        """Unit vectors (N, E) of captions, in the space shared with pictures."""
        return F.normalize(self.model.encode_text(self.tokenizer(captions).to(self.device)), dim=-1)

    @torch.no_grad()
    def embed_images(self, pixels: np.ndarray) -> torch.Tensor:
        """Unit vectors (N, E) of pictures (N, H, W, 3) uint8, resized to the tower's own side."""
        visual = self.model.visual
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, visual.image_size, mode="bicubic", antialias=True).clamp(0, 255) / 255
        mean = torch.tensor(visual.image_mean)[:, None, None]
        std = torch.tensor(visual.image_std)[:, None, None]
        return F.normalize(self.model.encode_image((x - mean) / std), dim=-1)


def load_text(name: str, device: str = "cpu") -> TextEncoder:
    """A text encoder of the table, a folder or a hub id, float32.

    Raises:
        SettingError: unknown name, weights not in the cache, or a folder that misses a file.
    """
    facts, folder = find_text(name)
    local = f"local-dir:{folder}"
    model = open_clip.create_model(local, require_pretrained=True)
    model.to(device).eval().requires_grad_(False)
    return TextEncoder(model, open_clip.get_tokenizer(local), facts)

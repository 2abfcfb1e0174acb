"""CLIP's text tower as transformers keeps it, alone or beside its image tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel

from pipeline.core.manifest import TextFacts
from pipeline.encoders.configs import check_loaded
from pipeline.encoders.loading import autocast, load_tokenizer, load_transformers


class ClipText:
    """A transformers CLIPTextModel with its tokenizer and facts."""

    def __init__(self, model: Any, tokenizer: Any, facts: TextFacts) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts = facts

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TextEncoder.encode`. Padding is attended, as where open_clip runs the same weights:
        behind a causal mask it changes no real row."""
        batch = self.tokenizer(
            captions,
            max_length=self.facts.length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        device = self.model.device
        with autocast(device, self.facts.dtype):
            tokens = self.model(input_ids=batch.input_ids.to(device)).last_hidden_state
        # Of the tokenizer, not of the ids: CLIP pads with end-of-text itself.
        return tokens.float().cpu(), batch.attention_mask.sum(dim=1)


def load(facts: TextFacts, folder: Path, device: str) -> ClipText:
    """Raises SettingError where the weights do not fit the config."""
    model = load_transformers(CLIPTextModel, facts, folder, device)
    own = {"width": model.config.hidden_size, "length": model.config.max_position_embeddings}
    check_loaded(f"text_encoder={facts.name}", folder, facts.model_dump(), own)
    return ClipText(model, load_tokenizer(facts, folder, model), facts)

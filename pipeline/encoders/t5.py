"""The encoders of T5, mT5 and umT5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MT5EncoderModel, T5EncoderModel, UMT5EncoderModel

from pipeline.core.manifest import TextFacts
from pipeline.encoders.configs import check_loaded
from pipeline.encoders.families import text_config
from pipeline.encoders.loading import autocast, load_tokenizer, load_transformers

_MODELS = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}


class T5Text:
    """A T5 encoder with its tokenizer and facts."""

    def __init__(self, model: Any, tokenizer: Any, facts: TextFacts) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts = facts

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TextEncoder.encode`. T5 looks both ways, so padding is masked: a real row does not
        depend on it. Rows of padding see the caption and are no zeros."""
        batch = self.tokenizer(
            captions,
            max_length=self.facts.length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        device, mask = self.model.device, batch.attention_mask
        with autocast(device, self.facts.dtype):
            found = self.model(batch.input_ids.to(device), attention_mask=mask.to(device))
        return found.last_hidden_state.float().cpu(), mask.sum(dim=1)


def load(facts: TextFacts, folder: Path, device: str) -> T5Text:
    """Raises SettingError where the weights do not fit the config."""
    kind = _MODELS[text_config(f"text_encoder={facts.name}", folder).model_type]
    model = load_transformers(kind, facts, folder, device)
    own = {"width": model.config.d_model}
    check_loaded(f"text_encoder={facts.name}", folder, facts.model_dump(), own)
    return T5Text(model, load_tokenizer(facts, folder, model), facts)

"""What encoders share: weights and tokenizers of transformers, and the type computed in."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch

from pipeline.core.errors import SettingError
from pipeline.core.manifest import TextFacts

_LAYER = re.compile(r"(text_model\.)?encoder\.(layers|block)\.\d")


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Computes in this type; nothing where it is that of the weights."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


def load_transformers(kind: Any, facts: TextFacts, folder: Path, device: str) -> Any:
    """A transformers model in float32, from safetensors only.

    Raises:
        SettingError: the folder's weights lack some of the model's, or have layers that it has
            not; transformers itself only warns, and leaves them random or out.
    """
    model, found = kind.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise SettingError(
            f"text_encoder={facts.name}: the weights in {folder} lack {len(missing)} tensors of "
            f"its config (first: {missing[0]})"
        )
    # Of a tower's own layers; image towers, decoders and buffers of older releases are others.
    if surplus := sorted(filter(_LAYER.match, found["unexpected_keys"])):
        raise SettingError(
            f"text_encoder={facts.name}: the config in {folder} has no place for {len(surplus)} "
            f"tensors of its weights (first: {surplus[0]})"
        )
    return model.float().to(device).eval().requires_grad_(False)


def load_tokenizer(facts: TextFacts, folder: Path, model: Any) -> Any:
    """The folder's own tokenizer; runs no code of the folder.

    Raises:
        SettingError: it is not that of the model: it cannot pad, its captions do not end in
            end-of-text, or it has ids that the model does not know.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    setting = f"text_encoder={facts.name}"
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise SettingError(f"{setting}: the tokenizer in {folder} has no {name}")
    ids = tokenizer("a").input_ids
    if not ids or ids[-1] != tokenizer.eos_token_id:
        raise SettingError(
            f"{setting}: captions of the tokenizer in {folder} do not end in its eos_token"
        )
    if max(tokenizer.get_vocab().values()) >= model.config.vocab_size:
        raise SettingError(
            f"{setting}: the tokenizer in {folder} has {len(tokenizer)} words, its model knows "
            f"{model.config.vocab_size}"
        )
    return tokenizer

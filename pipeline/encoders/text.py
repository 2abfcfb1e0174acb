"""Captions -> token vectors: one interface, a module for each family of encoders behind it."""

from __future__ import annotations

import contextlib
import pickle
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from pipeline.core.errors import SettingError
from pipeline.core.manifest import TextFacts
from pipeline.encoders import find_text
from pipeline.encoders.configs import BROKEN, first_line
from pipeline.encoders.families import text_config

_LAYER = re.compile(r"(text_model\.)?encoder\.(layers|block)\.\d")


class TextEncoder(Protocol):
    """A text encoder with its weights."""

    @property
    def facts(self) -> TextFacts: ...

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """What a network is conditioned on: the output of the encoder's last layer norm.

        Args:
            captions: N, one or more; of any length, cut where the encoder ends, with end-of-text
                kept.

        Returns:
            tokens (N, L, W) float32, lengths (N,) int64, both on the CPU. A caption's real rows are
            the first, up to and including end-of-text; the rest is what the encoder makes of
            padding.
        """
        ...


def load_text(
    name: str, device: str = "cpu", dtype: str = "float32", images: bool = False
) -> TextEncoder:
    """A text encoder of the table, a folder or a hub id, with float32 weights.

    Args:
        dtype: what it computes in: float32, or bfloat16 through autocast.
        images: with the image tower beside it (open_clip only), for a judge of pictures.

    Raises:
        SettingError: unknown name, weights not in the cache, a folder that misses a file or holds
            weights that cannot be read or do not fit its config, or a model without an image tower.
    """
    facts, folder = find_text(name)
    facts = facts.model_copy(update={"dtype": dtype})
    family = text_config(f"text_encoder={name}", folder).family
    if images and family != "open_clip":
        raise SettingError(
            f"{name}: is a text encoder alone; a judge of pictures is an open_clip model"
        )
    try:
        encoder = _load(family, facts, folder, device, images)
        encoder.encode(["a"])  # some numbers of a config are looked at only then
        return encoder
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise SettingError(
            f"text_encoder={name}: the weights in {folder} are cut off, or no weights: "
            f"{first_line(error)}"
        ) from error
    except SettingError:
        raise
    except BROKEN as error:
        raise SettingError(
            f"text_encoder={name}: {folder} cannot be loaded: its config, its tokenizer and its "
            f"weights do not fit, or are broken: {first_line(error)}"
        ) from error


def _load(family: str, facts: TextFacts, folder: Path, device: str, images: bool) -> TextEncoder:
    if family == "open_clip":
        from pipeline.encoders import openclip

        return openclip.load(facts, folder, device, images)
    if family == "clip":
        from pipeline.encoders import clip

        return clip.load(facts, folder, device)
    from pipeline.encoders import t5

    return t5.load(facts, folder, device)


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

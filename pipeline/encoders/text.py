"""Captions -> token vectors: one interface, a module for each family of encoders behind it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError

from pipeline.core.errors import SettingError
from pipeline.core.manifest import TextFacts
from pipeline.encoders.configs import BROKEN, first_line
from pipeline.encoders.families import text_config
from pipeline.encoders.table import find_text


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

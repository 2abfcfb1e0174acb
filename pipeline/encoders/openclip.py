"""The text tower of an open_clip model; the whole CLIP for a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import load_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from safetensors import safe_open

from pipeline.core.errors import SettingError
from pipeline.core.manifest import TextFacts
from pipeline.encoders.configs import check_loaded
from pipeline.encoders.families import open_clip_weights
from pipeline.encoders.loading import autocast

# Stands where the image tower belongs while a text tower is built; the real one of a ViT-H takes
# 2.5 GB.
_NO_IMAGES = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 8, "image_size": 8}
_IMAGES = "visual."  # what names of the image tower's tensors begin with


class OpenClip:
    """An open_clip model with its tokenizer and facts; `model.visual` is None without images."""

    def __init__(self, model: Any, tokenizer: Any, facts: TextFacts) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts = facts
        self.device = next(model.parameters()).device
        # CustomTextCLIP keeps the tower in .text; CLIP is its own text tower.
        self._tower = getattr(model, "text", model)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TextEncoder.encode`. Before pooling and projection, padding attended, as the
        official code does."""
        ids = self.tokenizer(captions).to(self.device)
        tower = self._tower
        with autocast(self.device, self.facts.dtype):
            x = tower.token_embedding(ids) + tower.positional_embedding
            x = tower.transformer(x, attn_mask=tower.attn_mask)
            x = tower.ln_final(x)
        # CLIP's convention: end-of-text has the highest id of the vocabulary.
        return x.float().cpu(), (ids.argmax(dim=-1) + 1).cpu()

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
        return F.normalize(self.model.encode_image(((x - mean) / std).to(self.device)), dim=-1)


def load(facts: TextFacts, folder: Path, device: str, images: bool) -> OpenClip:
    """The text tower, with the image tower beside it where that is wanted.

    Raises:
        SettingError: the weights do not fit the config.
    """
    local = f"local-dir:{folder}"
    path = open_clip_weights(f"text_encoder={facts.name}", folder)
    try:
        if images:
            # Of an open_clip folder's weights the library takes the same file as `path`.
            model: Any = open_clip.create_model(local, require_pretrained=True, weights_only=True)
        else:
            model = _text_tower(folder, path)
    except RuntimeError as error:
        first = str(error).split("\n\t")[1:2] or [str(error)]
        raise SettingError(
            f"text_encoder={facts.name}: {path} does not fit its config: {first[0]}"
        ) from error
    model.to(device).eval().requires_grad_(False)
    tower = getattr(model, "text", model)
    own = {
        "width": tower.token_embedding.embedding_dim,
        "length": tower.positional_embedding.shape[0],
    }
    setting = f"text_encoder={facts.name}"
    check_loaded(setting, folder, facts.model_dump(), own)
    tokenizer = open_clip.get_tokenizer(local)
    _check_tokenizer(setting, folder, tokenizer, tower.token_embedding.num_embeddings)
    return OpenClip(model, tokenizer, facts)


def _check_tokenizer(setting: str, folder: Path, tokenizer: Any, words: int) -> None:
    """That a caption's rows end where `OpenClip.encode` takes them to end.

    Raises:
        SettingError: end-of-text is not the highest id, or ids are beyond what the model knows.
    """
    short, long = tokenizer(["a", "a fox, a hen and an owl"]).tolist()
    last = max(short)
    if max(long) != last or short.index(last) >= long.index(last):
        raise SettingError(
            f"{setting}: end-of-text is not the highest id of a caption of the tokenizer in "
            f"{folder}; only CLIP's own convention is supported"
        )
    if last >= words:
        raise SettingError(
            f"{setting}: the tokenizer in {folder} has ids up to {last}, its model knows {words}"
        )


def _text_tower(folder: Path, path: Path) -> Any:
    """The model of a folder's config without its image tower."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    custom = config.pop("custom_text", False)
    kind: Any = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(**{**config, "vision_cfg": _NO_IMAGES})
    model.visual = None
    model.load_state_dict(_text_tensors(path, custom), strict=True)
    return model


def _text_tensors(path: Path, custom: bool) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint but those of the image tower, which are not read.

    Args:
        custom: they are for a CustomTextCLIP, which has a tower apart.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            state = {n: file.get_tensor(n) for n in file.keys() if not n.startswith(_IMAGES)}  # noqa: SIM118
    else:
        whole: Any = load_state_dict(str(path), weights_only=True)
        state = {n: tensor for n, tensor in whole.items() if not n.startswith(_IMAGES)}
    if custom and "positional_embedding" in state:
        state = convert_to_custom_text_state_dict(state)
    return state

"""Text encoders in the form that transformers loads, whatever form they came in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from pipeline.core.errors import SettingError

LAYER_NORM_EPS = 1e-5


class ExportedText:
    """A transformers model and tokenizer, and what the pipeline has to know of them."""

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings


def convert(encoder: Any, scratch: Path) -> ExportedText:
    """A text encoder of `pipeline.encoders` -> the same through transformers alone.

    Args:
        encoder: an OpenClip, ClipText or T5Text.
        scratch: a folder for a tokenizer's files, which transformers reads from files only.

    Raises:
        SettingError: an open_clip tower or tokenizer that CLIPTextModel does not know.
    """
    from pipeline.encoders.openclip import OpenClip

    settings = {"text_length": encoder.facts.length, "text_mask": False, "clean": ""}
    if isinstance(encoder, OpenClip):
        tokenizer, clean = _clip_tokenizer(encoder, scratch)
        # open_clip fills up with token 0, whatever the tokenizer calls padding.
        settings |= {"clean": clean, "pad_id": 0}
        return ExportedText(_clip_model(encoder), tokenizer, settings)
    settings["pad_id"] = encoder.tokenizer.pad_token_id
    settings["text_mask"] = type(encoder).__name__ == "T5Text"
    return ExportedText(encoder.model, encoder.tokenizer, settings)


def _clip_model(encoder: Any) -> CLIPTextModel:
    """The tower's weights under transformers' names; q, k and v are one matrix in open_clip."""
    tower, name = encoder._tower, encoder.facts.name
    blocks = list(tower.transformer.resblocks)
    kind = type(blocks[0].mlp.gelu).__name__
    act = {"GELU": "gelu", "QuickGELU": "quick_gelu"}.get(kind)
    if act is None or not all(isinstance(block.ls_1, nn.Identity) for block in blocks):
        raise SettingError(
            f"text encoder {name}: its blocks ({kind}, or with layer scale) are not CLIP's own, so "
            "transformers cannot run it"
        )
    width = tower.positional_embedding.shape[1]
    config = CLIPTextConfig(
        vocab_size=tower.token_embedding.num_embeddings,
        hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        projection_dim=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=len(tower.positional_embedding),
        hidden_act=act,
        layer_norm_eps=LAYER_NORM_EPS,
        bos_token_id=0,
        eos_token_id=2,  # pools at the highest id, as CLIP does; the pooled vector is not used
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    # Its positions 0, 1, 2, … are a buffer that no checkpoint holds.
    model.text_model.embeddings.position_ids = torch.arange(len(tower.positional_embedding))[None]
    model.load_state_dict(_clip_tensors(tower), strict=True, assign=True)
    return model.float().eval().requires_grad_(False)


def _clip_tensors(tower: Any) -> dict[str, Tensor]:
    tensors = {
        "embeddings.token_embedding.weight": tower.token_embedding.weight,
        "embeddings.position_embedding.weight": tower.positional_embedding,
        "final_layer_norm.weight": tower.ln_final.weight,
        "final_layer_norm.bias": tower.ln_final.bias,
    }
    for i, block in enumerate(tower.transformer.resblocks):
        parts = {
            "layer_norm1": block.ln_1,
            "layer_norm2": block.ln_2,
            "self_attn.out_proj": block.attn.out_proj,
            "mlp.fc1": block.mlp.c_fc,
            "mlp.fc2": block.mlp.c_proj,
        }
        for kind in ("weight", "bias"):
            own = {name: getattr(part, kind) for name, part in parts.items()}
            q, k, v = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            own |= {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
            tensors |= {f"encoder.layers.{i}.{name}.{kind}": t for name, t in own.items()}
    return {f"text_model.{name}": t.detach().clone() for name, t in tensors.items()}


def _clip_tokenizer(encoder: Any, scratch: Path) -> tuple[Any, str]:
    """The tokenizer, and what open_clip does to a caption before it."""
    tokenizer, name = encoder.tokenizer, encoder.facts.name
    clean = tokenizer.clean_fn.__name__.removeprefix("_clean_")
    if clean not in ("lower", "whitespace"):
        raise SettingError(f"text encoder {name}: cleans captions by {clean}; not exported")
    if type(tokenizer).__name__ == "HFTokenizer":
        return tokenizer.tokenizer, clean
    # CLIP's own byte-pair encoding, in the files that transformers' tokenizer reads.
    vocabulary, merges = scratch / "vocab.json", scratch / "merges.txt"
    vocabulary.write_text(json.dumps(tokenizer.encoder, ensure_ascii=False), "utf-8")
    pairs = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    merges.write_text("\n".join(lines) + "\n", "utf-8")
    start, end = tokenizer.all_special_ids[:2]
    fast = CLIPTokenizerFast(
        str(vocabulary),
        str(merges),
        bos_token=tokenizer.decoder[start],
        eos_token=tokenizer.decoder[end],
        unk_token=tokenizer.decoder[end],
        pad_token=tokenizer.decoder[end],
        model_max_length=encoder.facts.length,
    )
    return fast, clean

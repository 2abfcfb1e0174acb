"""Small text encoders of the real classes, saved as a hub repo has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.clip.tokenization_clip import bytes_to_unicode

CLIP_LENGTH, T5_LENGTH = 20, 24
CLIP_KINDS = ("clip_text_model", "clip_text_model_with_projection", "clip")
T5_KINDS = ("t5", "t5_whole", "umt5")


def save_clip(folder: Path, kind: str) -> Path:
    """A CLIP text tower alone, with its projection, or beside an image tower."""
    tokenizer: Any = _clip_tokenizer(folder)
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if kind == "clip":
        images: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
        }
        images |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
        config = CLIPConfig(text_config=text.to_dict(), vision_config=images, projection_dim=16)
        model = CLIPModel(config)
    elif kind == "clip_text_model":
        model = CLIPTextModel(text)
    else:
        model = CLIPTextModelWithProjection(text)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def save_t5(folder: Path, kind: str) -> Path:
    """A T5 encoder, a whole T5, or an umT5 encoder."""
    tokenizer = _t5_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    sizes |= {"vocab_size": len(tokenizer), "feed_forward_proj": "gated-gelu"}
    torch.manual_seed(0)
    if kind == "umt5":
        model = UMT5EncoderModel(UMT5Config(**sizes))
    elif kind == "t5":
        model = T5EncoderModel(T5Config(**sizes))
    else:
        model = T5ForConditionalGeneration(T5Config(**sizes))
    with torch.no_grad():  # a position bias that shows: it begins near zero
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_()
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def _clip_tokenizer(folder: Path) -> CLIPTokenizerFast:
    """CLIP's own byte-level BPE with a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = list(bytes_to_unicode().values())
    merges = [("r", "e"), ("re", "d</w>"), ("f", "o"), ("fo", "x</w>"), ("o", "n</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizerFast(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CLIP_LENGTH
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _t5_tokenizer() -> T5TokenizerFast:
    """Pieces of letters, as sentencepiece's Unigram has them; other scripts are <unk>."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces += [("▁red", -3.0), ("▁fox", -3.0), ("▁on", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(
        tokenizer_object=tokenizer, extra_ids=0, model_max_length=T5_LENGTH, legacy=False
    )

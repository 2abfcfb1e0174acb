"""A small random Qwen2-VL: another family, whose pictures come as one run of patches of any number,
and whose tokens have places in two dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from tests.captioning.helpers.small_llava import CHAT, small_tokenizer, spread

SLOT = "<|vision_start|><|image_pad|><|vision_end|>"


def save_qwen(folder: Path) -> Path:
    tokenizer: Any = Qwen2TokenizerFast(
        tokenizer_object=small_tokenizer().backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=2048,
    )
    words = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    tokenizer.add_special_tokens({"additional_special_tokens": list(words.values())})
    ends: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        **ends,
    }
    patches: dict[str, Any] = {"patch_size": 8, "temporal_patch_size": 2}
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
        **patches,
    }
    ids = {name: tokenizer.convert_tokens_to_ids(word) for name, word in words.items()}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    )
    spread(model, tokenizer)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder, safe_serialization=True)
    patches |= {"merge_size": 2, "min_pixels": 16 * 16, "max_pixels": 96 * 96}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**patches),
        tokenizer,
        Qwen2VLVideoProcessor(**patches),
        chat_template=CHAT.replace("<image>\n", SLOT),
    )
    processor.save_pretrained(folder)
    return folder

"""Small random LLaVA models of the real classes, saved as the hub's llava-hf repos have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizerFast,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)

SIDE, PATCH = 32, 8  # pixels: 16 tokens a picture
CHAT = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
WORDS = """a red blue green yellow white black picture photograph drawing of fox dog cat house tree
flower boat street mountain river sky with and on under near small large old bright dark two three
Describe this picture in one sentence USER ASSISTANT first the subject then what surrounds it"""


def save_llava(folder: Path, kind: str = "llava", hidden: int = 64, layers: int = 2) -> Path:
    """LLaVA 1.5 ("llava": one view a picture) or 1.6 ("llava_next": tiles by aspect ratio).

    Args:
        hidden: width of the language model, a multiple of 4.
        layers: of the language model.
    """
    tokenizer = small_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )
    text: Any = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    shared: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    torch.manual_seed(0)
    shapes: dict[str, Any] = {"patch_size": PATCH, "vision_feature_select_strategy": "default"}
    shapes |= {"num_additional_image_tokens": 1, "chat_template": CHAT}
    size: dict[str, Any] = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    if kind == "llava":
        model: Any = LlavaForConditionalGeneration(LlavaConfig(**shared))
        processor: Any = LlavaProcessor(CLIPImageProcessor(**size), tokenizer, **shapes)
    else:
        grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
        config = LlavaNextConfig(**shared, image_grid_pinpoints=grid)
        model = LlavaNextForConditionalGeneration(config)
        images = LlavaNextImageProcessor(**size, image_grid_pinpoints=grid)
        processor = LlavaNextProcessor(images, tokenizer, **shapes)
    spread(model, tokenizer)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
    return folder


def spread(model: Any, tokenizer: Any) -> None:
    """Weights large enough that scores differ by more than rounding, that a picture shows, that
    texts are of words, and that some of them end."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            if "lm_head" in name:
                parameter.mul_(3)
                parameter[: tokenizer.convert_tokens_to_ids("<0xFF>") + 1].mul_(0)
                parameter[tokenizer.eos_token_id].normal_(std=5 * parameter.shape[-1] ** -0.5)
            if "multi_modal_projector" in name and parameter.ndim > 1:
                parameter.mul_(2)


def small_tokenizer() -> Any:
    """Llama's kind of tokenizer: BPE over pieces that begin with a space, bytes as the last
    resort."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*special, *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    return LlamaTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        legacy=False,
        model_max_length=2048,
    )

"""What a model costs, in closed form: forward FLOPs of an image, and parameters.

FLOPs are 2 per multiply-add of matrix products and attention. Norms, activations and the
moving of tokens to experts are not counted, as in torch's own FLOP counter. A training step
without recomputation costs 3 forward passes.
"""

import torch

from training.dit import BlockShape, DiTConfig, MicroDiT
from training.layers import TIME_CHANNELS
from training.masking.deferred import kept_tokens
from training.moe import tokens_per_expert


def flops_per_image(
    config: DiTConfig, mask_ratio: float = 0.0, text_tokens: int | None = None
) -> int:
    """Forward FLOPs of one image with one caption.

    Args:
        config: the network.
        mask_ratio: share of tokens dropped after the patch-mixer, in [0, 1).
        text_tokens: caption rows, padding included; default ``config.caption_length``.

    Raises:
        ValueError: ``mask_ratio`` outside [0, 1), or so high that nothing is kept.
    """
    width, mixer_width, tokens = config.width, config.mixer_width, config.tokens
    kept = kept_tokens(tokens, mask_ratio)
    text = config.caption_length if text_tokens is None else text_tokens

    macs = tokens * config.patch_values * width  # patch embedding
    macs += (TIME_CHANNELS + width) * width  # noise level
    macs += text * (config.caption_width + width) * width  # caption projection
    caption = config.caption_shape()
    macs += _self_attention(caption, text) + _feed_forward(caption, text, config)
    macs += 2 * width * width  # pooled caption
    if mixer_width != width:
        macs += (tokens + text + kept) * width * mixer_width
    macs += sum(_block(shape, tokens, text, config) for shape in config.mixer_shapes())
    macs += sum(_block(shape, kept, text, config) for shape in config.backbone_shapes())
    macs += 2 * width * width + kept * width * config.patch_values  # final layer
    return 2 * macs


def num_parameters(config: DiTConfig) -> int:
    """Parameters of the network, counted on the meta device: no memory is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MicroDiT(config).parameters())


def _block(shape: BlockShape, tokens: int, text: int, config: DiTConfig) -> int:
    width = shape.width
    modulation = 6 * config.width * width
    queries_out = 2 * tokens * width * width
    keys_values = 2 * text * width * width
    attended = 2 * tokens * text * width
    cross_attention = queries_out + keys_values + attended
    self_attention = _self_attention(shape, tokens)
    return modulation + self_attention + cross_attention + _feed_forward(shape, tokens, config)


def _self_attention(shape: BlockShape, tokens: int) -> int:
    projections = 4 * tokens * shape.width * shape.attn_width
    return projections + 2 * tokens * tokens * shape.attn_width


def _feed_forward(shape: BlockShape, tokens: int, config: DiTConfig) -> int:
    if not shape.experts:
        return 3 * tokens * shape.width * shape.ffn_width
    k = tokens_per_expert(tokens, shape.experts, config.expert_capacity)
    gate = tokens * shape.width * shape.experts
    return gate + 2 * shape.experts * k * shape.width * shape.ffn_width

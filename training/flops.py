"""What a model costs, in closed form: forward FLOPs of an image, and parameters.

FLOPs are 2 per multiply-add of matrix products and attention. Norms, activations and the
moving of tokens to experts are not counted, as in torch's own FLOP counter. A training step
without recomputation costs 3 forward passes.
"""

import torch

from training.masking.deferred import Deferred
from training.masking.scheme import Scheme
from training.network.config import BlockShape, DiTConfig
from training.network.dit import MicroDiT
from training.network.layers import TIME_CHANNELS
from training.network.moe import tokens_per_expert

DEFERRED = Deferred()


def flops_per_image(
    config: DiTConfig,
    mask_ratio: float = 0.0,
    text_tokens: int | None = None,
    mask: Scheme = DEFERRED,
) -> int:
    """Forward FLOPs of one image with one caption.

    Args:
        config: the network.
        mask_ratio: share of tokens that the mask does not keep, in [0, 1).
        text_tokens: caption rows, padding included; default ``config.caption_length``.
        mask: which tokens are kept, and where the others leave.

    Raises:
        ValueError: a ratio that the scheme cannot have.
    """
    width, mixer_width, tokens = config.width, config.mixer_width, config.tokens
    kept, skips = mask.kept(tokens, mask_ratio), mask.skips
    mixed = kept if skips == "network" else tokens  # tokens that the mixer sees
    left = kept if isinstance(skips, str) else tokens  # tokens that the backbone begins with
    first, last = (0, -1) if isinstance(skips, str) else skips
    text = config.caption_length if text_tokens is None else text_tokens

    macs = tokens * config.patch_values * width  # patch embedding
    macs += (TIME_CHANNELS + width) * width  # noise level
    macs += text * (config.caption_width + width) * width  # caption projection
    caption = config.caption_shape()
    macs += _self_attention(caption, text) + _feed_forward(caption, text, config)
    macs += 2 * width * width  # pooled caption
    if mixer_width != width and config.mixer_depth:
        macs += (mixed + text + left) * width * mixer_width
    macs += sum(_block(shape, mixed, text, config) for shape in config.mixer_shapes())
    for i, shape in enumerate(config.backbone_shapes()):
        macs += _block(shape, kept if first <= i <= last else left, text, config)
    if config.decoder_depth:
        macs += _decoder(config, left)
        left = tokens
    macs += (2 * width + left * config.patch_values) * config.output_width  # final layer
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


def _decoder(config: DiTConfig, kept: int) -> int:
    shape, width, tokens = config.decoder_shape(), config.width, config.tokens
    entry = 2 * width * width + kept * width * shape.width
    modulation = 6 * width * shape.width
    feed_forward = _feed_forward(shape, tokens, config)
    return entry + config.decoder_depth * (
        modulation + _self_attention(shape, tokens) + feed_forward
    )


def _self_attention(shape: BlockShape, tokens: int) -> int:
    projections = 4 * tokens * shape.width * shape.attn_width
    return projections + 2 * tokens * tokens * shape.attn_width


def _feed_forward(shape: BlockShape, tokens: int, config: DiTConfig) -> int:
    if not shape.experts:
        matrices = 3 if config.feed_forward == "swiglu" else 2
        return matrices * tokens * shape.width * shape.ffn_width
    k = tokens_per_expert(tokens, shape.experts, config.expert_capacity)
    gate = tokens * shape.width * shape.experts
    return gate + 2 * shape.experts * k * shape.width * shape.ffn_width

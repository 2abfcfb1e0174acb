"""MaskDiT's decoder (Zheng et al. 2023, arXiv 2306.09305): fills in the dropped patches.

It reads the backbone's output at the kept patches, and a learned token in the places of the others,
and gives every patch an output. It stays a part of the network when nothing is dropped.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.network.blocks import Modulation
from training.network.config import DECODER_HEADS, DiTConfig
from training.network.layers import (
    FEED_FORWARDS,
    INIT_STD,
    SelfAttention,
    layer_norm,
    position_table,
)
from training.network.recompute import Normed
from training.network.tokens import TokenMask


class DecoderEntry(nn.Module):
    """Modulated layer norm without weights, and a projection; 0 at initialisation."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.width, self.eps = config.width, config.norm_eps
        self.adaLN_modulation = Modulation(config.width, config.width, vectors=2)
        self.linear = nn.Linear(config.width, config.decoder_width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, K, D), condition (B, D) -> (B, K, d)."""
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        h = F.layer_norm(x, (self.width,), eps=self.eps)
        return self.linear(torch.addcmul(shift, h, 1 + scale))

    def initialise(self) -> None:
        self.adaLN_modulation.initialise()
        nn.init.zeros_(self.linear.weight)


class DecoderBlock(nn.Module):
    """Self-attention and feed-forward, modulated and gated by the condition (adaLN-Zero, DiT)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        shape, eps = config.decoder_shape(), config.norm_eps
        width = shape.width
        self.norm1 = layer_norm(width, eps)
        self.attn = SelfAttention(width, shape.attn_width, width // DECODER_HEADS, eps)
        self.norm2 = layer_norm(width, eps)
        self.mlp = FEED_FORWARDS[config.feed_forward](width, shape.ffn_width)
        self.adaLN_modulation = Modulation(config.width, width, vectors=6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, T, d), condition (B, D) -> (B, T, d)."""
        modulation = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation
        h = self.attn(Normed(x, self.norm1, shift_attn, scale_attn))
        x = torch.addcmul(x, gate_attn, h)
        h = self.mlp(Normed(x, self.norm2, shift_ffn, scale_ffn))
        return torch.addcmul(x, gate_ffn, h)

    def initialise(self, std_out: float, generator: torch.Generator | None) -> None:
        self.attn.initialise(std_out, generator)
        self.mlp.initialise(std_out, generator)
        self.adaLN_modulation.initialise()


class Decoder(nn.Module):
    """Entry, mask token, positions and blocks; the network's final layer reads its output."""

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.register_buffer("pos_embed", torch.empty(1, config.tokens, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.entry = DecoderEntry(config)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))

    def forward(self, x: Tensor, condition: Tensor, mask: TokenMask | None) -> Tensor:
        """Kept tokens x (B, K, D), or all (B, T, D) without a mask, condition (B, D)
        -> (B, T, d)."""
        x = self.entry(x, condition)
        if mask is not None:
            x = mask.restore(x, self.mask_token)
        elif self.training:
            # Nothing, but a gradient: ranks that train together wait for every parameter's.
            x = x + 0 * self.mask_token
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x, condition)
        return x

    def set_positions(self, config: DiTConfig) -> None:
        """The position table of the config's resolution."""
        table = position_table(config.decoder_width, config.grid, config.pos_interp_scale)[None]
        self.pos_embed = table.to(self.pos_embed)

    def initialise(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.mask_token, std=INIT_STD, generator=generator)
        self.entry.initialise()
        for i, block in enumerate(self.blocks):
            cast(DecoderBlock, block).initialise(0.02 / math.sqrt(2 * (i + 1)), generator)

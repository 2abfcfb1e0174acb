"""Transformer blocks of a MicroDiT (arXiv 2407.15811), conditioned by adaptive layer norm as in DiT
(arXiv 2212.09748)."""

import torch
from torch import Tensor, nn

from training.network.config import BlockShape, DiTConfig
from training.network.layers import (
    FEED_FORWARDS,
    CrossAttention,
    KeysValues,
    SelfAttention,
    layer_norm,
)
from training.network.moe import ExpertChoiceMLP
from training.network.recompute import Normed

CAPTION_STD_OUT = 0.02


class CaptionBlock(nn.Module):
    """Pre-norm transformer block over the caption tokens; the identity at initialisation."""

    def __init__(self, shape: BlockShape, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = layer_norm(shape.width, config.norm_eps)
        self.attn = SelfAttention(shape.width, shape.attn_width, config.head_dim, config.norm_eps)
        self.norm2 = layer_norm(shape.width, config.norm_eps)
        self.mlp = FEED_FORWARDS[config.feed_forward](shape.width, shape.ffn_width)

    def forward(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """y (B, L, d), bias (B, 1, 1, L) -> (B, L, d)."""
        y = y + self.attn(Normed(y, self.norm1), bias)
        return y + self.mlp(Normed(y, self.norm2))

    def initialise(self, generator: torch.Generator | None) -> None:
        self.attn.initialise(CAPTION_STD_OUT, generator)
        self.mlp.initialise(CAPTION_STD_OUT, generator)
        nn.init.zeros_(self.attn.proj.weight)
        self.mlp.close()


class Modulation(nn.Sequential):
    """Condition (B, D) -> shifts, scales and gates (B, vectors * d), all 0 at initialisation."""

    def __init__(self, condition: int, width: int, vectors: int) -> None:
        super().__init__(nn.GELU(approximate="tanh"), nn.Linear(condition, vectors * width))

    def initialise(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to the caption, feed-forward.

    The first and the last are modulated and gated by the condition (adaLN-Zero, DiT); the
    cross-attention is neither.
    """

    def __init__(self, shape: BlockShape, config: DiTConfig) -> None:
        super().__init__()
        width, eps = shape.width, config.norm_eps
        self.norm1 = layer_norm(width, eps)
        self.attn = SelfAttention(width, shape.attn_width, config.head_dim, eps)
        self.cross_attn = CrossAttention(width, config.head_dim, eps)
        self.norm2 = layer_norm(width, eps)
        self.norm3 = layer_norm(width, eps)
        self.mlp = (
            ExpertChoiceMLP(width, shape.ffn_width, shape.experts, config.expert_capacity)
            if shape.experts
            else FEED_FORWARDS[config.feed_forward](width, shape.ffn_width)
        )
        self.adaLN_modulation = Modulation(config.width, width, vectors=6)

    def forward(
        self, x: Tensor, condition: Tensor, caption: Tensor | KeysValues, bias: Tensor | None
    ) -> Tensor:
        """x (B, T, d), condition (B, D), caption (B, L, d), bias (B, 1, 1, L) -> (B, T, d)."""
        modulation = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation
        h = self.attn(Normed(x, self.norm1, shift_attn, scale_attn))
        x = torch.addcmul(x, gate_attn, h)
        x = x + self.cross_attn(Normed(x, self.norm2), caption, bias)
        h = self.mlp(Normed(x, self.norm3, shift_ffn, scale_ffn))
        return torch.addcmul(x, gate_ffn, h)

    def initialise(self, std_out: float, generator: torch.Generator | None) -> None:
        self.attn.initialise(std_out, generator)
        self.cross_attn.initialise(std_out, generator)
        self.mlp.initialise(std_out, generator)
        self.adaLN_modulation.initialise()


class FinalLayer(nn.Module):
    """Modulated layer norm and a projection to the latent values of each patch."""

    def __init__(self, width: int, config: DiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(width, config.patch_values)
        self.adaLN_modulation = Modulation(config.width, width, vectors=2)
        self.norm_final = layer_norm(width, config.norm_eps)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, T, d), condition (B, D) -> (B, T, p * p * C)."""
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(Normed(x, self.norm_final, shift, scale).value())

    def initialise(self) -> None:
        nn.init.zeros_(self.linear.weight)
        self.adaLN_modulation.initialise()

"""The network written down plainly, layer by layer, as the paper's code computes it.

The oracle that `training.network.dit` is compared with: in value by
tests/training/network/test_oracle.py, in speed and memory by `python -m benchmarks model`. Every
projection is a matrix product of its own, experts get their tokens through one-hot products (arXiv
2202.09368, section 3), normalisations, modulations and gates are separate operations, and the mask
gathers over an index as wide as the tokens. Only torch is needed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.network.config import BlockShape, DiTConfig
from training.network.dit import MicroDiT

CHANNELS, MAX_PERIOD = 512, 10_000.0


def plain(network: MicroDiT) -> PlainMicroDiT:
    """The same function as `network`, with copies of its weights."""
    oracle = PlainMicroDiT(network.config)
    oracle.load_state_dict(_separate(network.state_dict()))
    return oracle


def _separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused projections taken apart: qkv in three, kv in two."""
    out = {}
    for name, value in state.items():
        stem, dot, leaf = name.rpartition(".")
        parts = {"qkv": "qkv", "kv_linear": "kv"}.get(stem.rpartition(".")[2])
        if parts is None:
            out[name.replace("q_linear", "q")] = value.clone()
            continue
        for part, own in zip(parts, value.chunk(len(parts)), strict=True):
            out[f"{stem.rpartition('.')[0]}.{part}{dot}{leaf}"] = own.clone()
    return out


def norm(width: int, eps: float) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=eps, bias=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class PlainAttention(nn.Module):
    """Queries from x, keys and values from y; norms over all heads at once, without weights."""

    def __init__(self, width: int, attn_width: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.width, self.head_dim, self.eps = attn_width, head_dim, eps
        self.q = nn.Linear(width, attn_width, bias=False)
        self.k = nn.Linear(width, attn_width, bias=False)
        self.v = nn.Linear(width, attn_width, bias=False)
        self.proj = nn.Linear(attn_width, width, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = F.layer_norm(self.q(x), (self.width,), eps=self.eps)
        k = F.layer_norm(self.k(y), (self.width,), eps=self.eps)
        q, k, v = (self._heads(part) for part in (q, k, self.v(y)))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(len(x), -1, self.width))

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.width // self.head_dim, self.head_dim).transpose(1, 2)


class PlainSwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class PlainExperts(nn.Module):
    """Expert choice with one-hot dispatch: 4 E k T d FLOPs a sample, and an (E, k, T) tensor."""

    def __init__(self, width: int, hidden: int, experts: int, capacity: float) -> None:
        super().__init__()
        self.experts, self.capacity = experts, capacity
        self.w1 = nn.Parameter(torch.empty(experts, width, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, width))
        self.gate = nn.Linear(width, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        k = max(1, int(self.capacity * tokens / self.experts))
        scores = self.gate(x).softmax(-1)
        gate, chosen = scores.transpose(1, 2).topk(k, dim=-1)  # (B, E, k)
        dispatch = F.one_hot(chosen, tokens).to(x.dtype)  # (B, E, k, T)
        own = torch.einsum("bekt,btd->bekd", dispatch, x)
        hidden = F.gelu(torch.einsum("bekd,edf->bekf", own, self.w1))
        out = torch.einsum("bekf,efd->bekd", hidden, self.w2)
        return torch.einsum("bekt,bek,bekd->btd", dispatch, gate, out)


class PlainBlock(nn.Module):
    def __init__(self, shape: BlockShape, config: DiTConfig) -> None:
        super().__init__()
        width, eps = shape.width, config.norm_eps
        self.norm1, self.norm2, self.norm3 = (norm(width, eps) for _ in range(3))
        self.attn = PlainAttention(width, shape.attn_width, config.head_dim, eps)
        self.cross_attn = PlainAttention(width, width, config.head_dim, eps)
        self.mlp = (
            PlainExperts(width, shape.ffn_width, shape.experts, config.expert_capacity)
            if shape.experts
            else PlainSwiGLU(width, shape.ffn_width)
        )
        self.adaLN_modulation = nn.Sequential(
            nn.GELU(approximate="tanh"), nn.Linear(config.width, 6 * width)
        )

    def forward(self, x: Tensor, y: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.adaLN_modulation(condition).chunk(
            6, dim=1
        )
        h = modulate(self.norm1(x), shift_a, scale_a)
        x = x + gate_a[:, None] * self.attn(h, h)
        x = x + self.cross_attn(self.norm2(x), y)
        return x + gate_f[:, None] * self.mlp(modulate(self.norm3(x), shift_f, scale_f))


class PlainCaptionMLP(nn.Module):
    def __init__(self, width_in: int, width: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, width)
        self.norm = norm(width, eps)
        self.fc2 = nn.Linear(width, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(y), approximate="tanh")))


class PlainCaptionBlock(nn.Module):
    def __init__(self, shape: BlockShape, config: DiTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (norm(shape.width, config.norm_eps) for _ in range(2))
        self.attn = PlainAttention(shape.width, shape.width, config.head_dim, config.norm_eps)
        self.mlp = PlainSwiGLU(shape.width, shape.ffn_width)

    def forward(self, y: Tensor) -> Tensor:
        h = self.norm1(y)
        y = y + self.attn(h, h)
        return y + self.mlp(self.norm2(y))


class Named(nn.ModuleDict):
    """Layers under the names that the released weights give them."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(layers)


class PlainMicroDiT(nn.Module):
    """F(x (B, C, S, S), c_noise (B,), y (B, L, W)) -> (B, C, S, S); captions attended in full."""

    pos_embed: Tensor
    mask_token: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, mixer, eps = config.width, config.mixer_width, config.norm_eps
        self.register_buffer("pos_embed", torch.empty(1, config.tokens, width))
        self.register_buffer("mask_token", torch.zeros(1, 1, config.patch_values))
        p = config.patch_size
        self.x_embedder = Named(proj=nn.Conv2d(config.in_channels, width, p, stride=p))
        layers = nn.Linear(CHANNELS, width), nn.GELU("tanh"), nn.Linear(width, width)
        self.t_embedder = Named(mlp=nn.Sequential(*layers))
        self.y_embedder = Named(y_proj=PlainCaptionMLP(config.caption_width, width, eps))
        self.y_emb_preprocess = PlainCaptionBlock(config.caption_shape(), config)
        self.pooled_y_emb_process = PlainCaptionMLP(width, width, eps)

        def between(width_in: int, width_out: int) -> nn.Sequential:
            if width == mixer:
                return nn.Sequential()
            return nn.Sequential(norm(width_in, eps), nn.Linear(width_in, width_out, bias=False))

        self.patch_mixer_map_xin = between(width, mixer)
        self.patch_mixer_map_xout = between(mixer, width)
        self.patch_mixer_map_y = between(width, mixer)
        self.patch_mixer = nn.ModuleList(PlainBlock(s, config) for s in config.mixer_shapes())
        self.blocks = nn.ModuleList(PlainBlock(s, config) for s in config.backbone_shapes())
        self.final_layer = Named(
            linear=nn.Linear(width, config.patch_values),
            adaLN_modulation=nn.Sequential(nn.GELU("tanh"), nn.Linear(width, 2 * width)),
            norm_final=norm(width, eps),
        )

    def forward(
        self, x: Tensor, c_noise: Tensor, y: Tensor, noise: Tensor | None = None, ratio: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """F, and which patches were dropped, (B, T).

        Args:
            noise: uniform (B, T): the tokens of the smallest stay.
        """
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        steps = torch.arange(CHANNELS // 2, device=x.device)
        frequencies = MAX_PERIOD ** (-steps * 2 / CHANNELS)
        angle = c_noise[:, None] * frequencies
        time = self.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], dim=-1))
        y = self.y_emb_preprocess(self.y_embedder["y_proj"](y))
        condition = time + self.pooled_y_emb_process(y.mean(dim=1))
        x, y_mixer = self.patch_mixer_map_xin(x), self.patch_mixer_map_y(y)
        for block in self.patch_mixer:
            x = block(x, y_mixer, condition)
        restore = dropped = None
        if noise is not None:
            tokens, keep = x.shape[1], int(x.shape[1] * (1 - ratio))
            order = noise.argsort(dim=1)
            restore = order.argsort(dim=1)
            x = x.gather(1, order[:, :keep, None].expand(-1, -1, x.shape[2]))
            dropped = torch.ones(len(x), tokens, device=x.device)
            dropped[:, :keep] = 0
            dropped = dropped.gather(1, restore)
        x = self.patch_mixer_map_xout(x)
        for block in self.blocks:
            x = block(x, y, condition)
        shift, scale = self.final_layer["adaLN_modulation"](condition).chunk(2, dim=1)
        x = modulate(self.final_layer["norm_final"](x), shift, scale)
        x = self.final_layer["linear"](x)
        if restore is not None:
            fill = self.mask_token.expand(len(x), restore.shape[1] - x.shape[1], -1)
            x = torch.cat([x, fill], dim=1)
            x = x.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2]))
        return self._unpatchify(x), dropped

    def _unpatchify(self, x: Tensor) -> Tensor:
        p, side = self.config.patch_size, math.isqrt(x.shape[1])
        x = x.reshape(len(x), side, side, p, p, -1)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(len(x), -1, side * p, side * p)

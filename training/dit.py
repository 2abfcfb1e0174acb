"""MicroDiT: a diffusion transformer whose backbone sees a share of the patches in training.

Architecture of Sehwag et al. 2024 (arXiv 2407.15811): a patch-mixer reads all patches, then
most are dropped ("deferred masking"), and a backbone with layer-wise scaling (OpenELM, arXiv
2404.14619) and expert-choice mixtures (arXiv 2202.09368) denoises the rest. Conditioning by
adaptive layer norm follows DiT (arXiv 2212.09748). State-dict keys, shapes and registration
order are those of the released checkpoints.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from training.layers import (
    CaptionEmbedder,
    CaptionMLP,
    CrossAttention,
    KeysValues,
    PatchEmbed,
    SelfAttention,
    SwiGLU,
    TimestepEmbedder,
    layer_norm,
    position_table,
)
from training.masking.tokens import TokenMask
from training.moe import ExpertChoiceMLP

CAPTION_FFN_MULTIPLIER = 4.0
CAPTION_STD_OUT = 0.02

_COUNTS = (
    "patch_size",
    "in_channels",
    "width",
    "depth",
    "head_dim",
    "multiple_of",
    "mixer_width",
    "num_experts",
    "caption_width",
    "caption_length",
)


def _linear(ends: tuple[float, float], count: int) -> list[float]:
    start, stop = ends
    if count == 1:
        return [start]
    step = (stop - start) / (count - 1)
    # The last value is exactly the end: its ratio is compared with 1 and its width truncated.
    return [start + i * step for i in range(count - 1)] + [stop]


def _require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{name} {value}: {remedy}")


@dataclass(frozen=True)
class BlockShape:
    """The sizes of one transformer block after layer-wise scaling."""

    width: int
    attn_width: int
    ffn_width: int
    experts: int
    """Number of experts of its feed-forward; 0 is a dense SwiGLU."""


@dataclass(frozen=True)
class DiTConfig:
    """Everything that decides the network's shape. The defaults are MicroDiT_Tiny_2.

    Raises:
        ValueError: a setting that no network can have; the message names it and a remedy.
    """

    input_size: int = 32
    """Side of the square latent; 32 is 256 px through a VAE that downsamples by 8."""
    patch_size: int = 2
    in_channels: int = 4
    width: int = 512
    depth: int = 16
    head_dim: int = 32
    qkv_multipliers: tuple[float, float] = (0.5, 1.0)
    """Self-attention width / width, first to last backbone block, linear in between."""
    ffn_multipliers: tuple[float, float] = (0.5, 4.0)
    """Feed-forward width / width, first to last backbone block, before SwiGLU's 2/3."""
    multiple_of: int = 256
    """Feed-forward widths are rounded up to a multiple of this."""
    mixer_width: int = 512
    mixer_depth: int = 4
    """Blocks that see all patches; 0 is naive masking."""
    mixer_ffn_multiplier: float = 4.0
    num_experts: int = 8
    expert_capacity: float = 2.0
    """Experts that choose a token, on average."""
    moe_every: int = 2
    """Every n-th block has experts, the last backbone block never; 0 is dense throughout."""
    caption_width: int = 1024
    caption_length: int = 77
    pos_interp_scale: float = 1.0
    """Positions are divided by this: 2.0 lets a grid twice as fine span the same range."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("qkv_multipliers", "ffn_multipliers"):  # JSON and YAML give lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("qkv_multipliers", "ffn_multipliers"):
            pair = getattr(self, name)
            _require(len(pair) == 2 and min(pair) > 0, name, pair, "give two numbers above 0")
        for name in _COUNTS:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("mixer_depth", "moe_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("mixer_ffn_multiplier", "pos_interp_scale", "norm_eps"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        size, patch = self.input_size, self.patch_size
        remedy = f"choose a latent side that is a multiple of patch_size {patch}"
        _require(size > 0 and size % patch == 0, "input_size", size, remedy)
        for name in ("width", "mixer_width"):
            value = getattr(self, name)
            remedy = f"choose a multiple of head_dim {self.head_dim}"
            _require(value % self.head_dim == 0, name, value, remedy)
        remedy = "choose a multiple of 4 (a sine and a cosine for each of two axes)"
        _require(self.width % 4 == 0, "width", self.width, remedy)
        remedy = f"choose above 0 and at most num_experts {self.num_experts}"
        in_range = 0 < self.expert_capacity <= self.num_experts
        _require(in_range, "expert_capacity", self.expert_capacity, remedy)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches of one image."""
        return self.grid**2

    @property
    def patch_values(self) -> int:
        """Latent values in one patch."""
        return self.patch_size**2 * self.in_channels

    def mixer_shapes(self) -> list[BlockShape]:
        """Sizes of the patch-mixer's blocks, which are all alike but for the experts."""
        width, ratio = self.mixer_width, self.mixer_ffn_multiplier
        return [
            self._block(width, 1.0, ratio, self._has_experts(i)) for i in range(self.mixer_depth)
        ]

    def backbone_shapes(self) -> list[BlockShape]:
        """Sizes of the backbone's blocks, growing with depth (OpenELM, layer-wise scaling)."""
        ratios = zip(
            _linear(self.qkv_multipliers, self.depth),
            _linear(self.ffn_multipliers, self.depth),
            strict=True,
        )
        return [
            self._block(self.width, r_qkv, r_ffn, self._has_experts(i) and i != self.depth - 1)
            for i, (r_qkv, r_ffn) in enumerate(ratios)
        ]

    def caption_shape(self) -> BlockShape:
        """Sizes of the block that reads the caption."""
        return self._block(self.width, 1.0, CAPTION_FFN_MULTIPLIER, False)

    def _has_experts(self, index: int) -> bool:
        return self.moe_every > 0 and (index + 1) % self.moe_every == 0

    def _block(self, width: int, r_qkv: float, r_ffn: float, experts: bool) -> BlockShape:
        # An even number of heads, as OpenELM's groups need; a ratio of 1 keeps the width.
        pair = 2 * self.head_dim
        attn_width = width if r_qkv == 1 else pair * math.ceil(int(width * r_qkv) / pair)
        hidden = int(width * r_ffn) if experts else int(2 * int(width * r_ffn) / 3)
        ffn_width = self.multiple_of * math.ceil(hidden / self.multiple_of)
        return BlockShape(width, attn_width, ffn_width, self.num_experts if experts else 0)


MODELS: dict[str, DiTConfig] = {
    "MicroDiT_Tiny_2": DiTConfig(),
    "MicroDiT_XL_2": DiTConfig(width=1024, depth=28, head_dim=64, mixer_width=768, mixer_depth=6),
}
"""Configurations of the paper, at 256 px and 4 latent channels."""


@dataclass(frozen=True)
class Text:
    """A batch of captions as the blocks consume them; `MicroDiT.encode_text` makes it."""

    pooled: Tensor
    """(B, d), added to the noise level's embedding."""
    mixer: Sequence[Tensor | KeysValues]
    """For each mixer block the caption tokens (B, L, mixer width), or its keys and values."""
    backbone: Sequence[Tensor | KeysValues]
    """For each backbone block the caption tokens (B, L, d), or its keys and values."""
    bias: Tensor | None
    """(B, 1, 1, L): 0 for real caption rows and -inf for padding; None if all are attended."""


class CaptionBlock(nn.Module):
    """Pre-norm transformer block over the caption tokens; the identity at initialisation."""

    def __init__(self, shape: BlockShape, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = layer_norm(shape.width, config.norm_eps)
        self.attn = SelfAttention(shape.width, shape.attn_width, config.head_dim, config.norm_eps)
        self.norm2 = layer_norm(shape.width, config.norm_eps)
        self.mlp = SwiGLU(shape.width, shape.ffn_width)

    def forward(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """y (B, L, d), bias (B, 1, 1, L) -> (B, L, d)."""
        y = y + self.attn(self.norm1(y), bias)
        return y + self.mlp(self.norm2(y))

    def initialise(self, generator: torch.Generator | None) -> None:
        self.attn.initialise(CAPTION_STD_OUT, generator)
        self.mlp.initialise(CAPTION_STD_OUT, generator)
        nn.init.zeros_(self.attn.proj.weight)
        nn.init.zeros_(self.mlp.w3.weight)


class Modulation(nn.Sequential):
    """Condition (B, D) -> shifts, scales and gates (B, vectors * d), all 0 at initialisation."""

    def __init__(self, condition: int, width: int, vectors: int) -> None:
        super().__init__(nn.GELU(approximate="tanh"), nn.Linear(condition, vectors * width))

    def initialise(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)  # one pass over x, and one less saved for backward


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
            else SwiGLU(width, shape.ffn_width)
        )
        self.adaLN_modulation = Modulation(config.width, width, vectors=6)

    def forward(
        self, x: Tensor, condition: Tensor, caption: Tensor | KeysValues, bias: Tensor | None
    ) -> Tensor:
        """x (B, T, d), condition (B, D), caption (B, L, d), bias (B, 1, 1, L) -> (B, T, d)."""
        modulation = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation
        h = self.attn(_modulate(self.norm1(x), shift_attn, scale_attn))
        x = torch.addcmul(x, gate_attn, h)
        x = x + self.cross_attn(self.norm2(x), caption, bias)
        h = self.mlp(_modulate(self.norm3(x), shift_ffn, scale_ffn))
        return torch.addcmul(x, gate_ffn, h)

    def initialise(self, std_out: float, generator: torch.Generator | None) -> None:
        self.attn.initialise(std_out, generator)
        self.cross_attn.initialise(std_out, generator)
        self.mlp.initialise(std_out, generator)
        self.adaLN_modulation.initialise()


class FinalLayer(nn.Module):
    """Modulated layer norm and a projection to the latent values of each patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.patch_values)
        self.adaLN_modulation = Modulation(config.width, config.width, vectors=2)
        self.norm_final = layer_norm(config.width, config.norm_eps)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, T, d), condition (B, d) -> (B, T, p * p * C)."""
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))

    def initialise(self) -> None:
        nn.init.zeros_(self.linear.weight)
        self.adaLN_modulation.initialise()


class MicroDiT(nn.Module):
    """The raw network F of EDM's D = c_skip x + c_out F(c_in x; c_noise, y).

    Captions are attended in one of two ways. Without ``y_mask`` every row counts, padding
    included, as in the released checkpoints. With it, rows that are False are no keys in any
    attention and are left out of the pooled caption, so that padding cannot change the result.
    """

    pos_embed: Tensor
    mask_token: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, mixer_width, eps = config.width, config.mixer_width, config.norm_eps

        def project(width_in: int, width_out: int) -> nn.Module:
            if width == mixer_width:
                return nn.Identity()
            return nn.Sequential(
                layer_norm(width_in, eps), nn.Linear(width_in, width_out, bias=False)
            )

        # Registered in the order of the released checkpoints.
        self.register_buffer("pos_embed", torch.empty(1, config.tokens, width))
        self.register_buffer("mask_token", torch.empty(1, 1, config.patch_values))
        self.x_embedder = PatchEmbed(config.in_channels, width, config.patch_size)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = CaptionEmbedder(config.caption_width, width, eps)
        self.y_emb_preprocess = CaptionBlock(config.caption_shape(), config)
        self.pooled_y_emb_process = CaptionMLP(width, width, eps)
        self.patch_mixer = nn.ModuleList(DiTBlock(s, config) for s in config.mixer_shapes())
        self.patch_mixer_map_xin = project(width, mixer_width)
        self.patch_mixer_map_xout = project(mixer_width, width)
        self.patch_mixer_map_y = project(width, mixer_width)
        self.blocks = nn.ModuleList(DiTBlock(s, config) for s in config.backbone_shapes())
        self.final_layer = FinalLayer(config)
        self.initialise()

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        y: Tensor | Text,
        y_mask: Tensor | None = None,
        mask: TokenMask | None = None,
    ) -> Tensor:
        """Predict F.

        Args:
            x: noisy latents already scaled by c_in, (B, C, S, S).
            c_noise: ln(sigma) / 4, (B,) or (1,).
            y: captions (B, L, W) or (B, 1, L, W), or what `encode_text` made of them.
            y_mask: bool (B, L), True for real caption rows, at least one in each sample.
            mask: which patches the backbone sees; None is all of them.

        Returns:
            F (B, C, S, S), 0 in dropped patches.

        Raises:
            ValueError: latents or captions of another shape than the configuration's.
        """
        config = self.config
        expected = (config.in_channels, config.input_size, config.input_size)
        if x.shape[1:] != expected:
            raise ValueError(
                f"latents {tuple(x.shape)}: this model takes (B, {expected[0]}, {expected[1]}, "
                f"{expected[2]}); change in_channels, or the resolution with set_resolution"
            )
        text = y if isinstance(y, Text) else self._read(y, y_mask)
        condition = self.t_embedder(c_noise) + text.pooled
        x = self.patch_mixer_map_xin(self.x_embedder(x) + self.pos_embed)
        for block, caption in zip(self.patch_mixer, text.mixer, strict=True):
            x = block(x, condition, caption, text.bias)
        if mask is not None:
            x = mask.keep(x)  # before the projection, which then has fewer tokens to do
        x = self.patch_mixer_map_xout(x)
        for block, caption in zip(self.blocks, text.backbone, strict=True):
            x = block(x, condition, caption, text.bias)
        x = self.final_layer(x, condition)
        if mask is not None:
            x = mask.restore(x, self.mask_token)
        return self._unpatchify(x)

    def encode_text(self, y: Tensor, y_mask: Tensor | None = None) -> Text:
        """Read captions once for many calls of `forward`, as a sampler makes them.

        Includes the keys and values of every cross-attention. Arguments as for `forward`.
        """
        text = self._read(y, y_mask)
        return dataclasses.replace(
            text,
            mixer=_keys_values(self.patch_mixer, text.mixer),
            backbone=_keys_values(self.blocks, text.backbone),
        )

    def set_resolution(self, input_size: int, pos_interp_scale: float) -> None:
        """Change the latent side and recompute the position table; weights stay as they are.

        Raises:
            ValueError: ``input_size`` is no multiple of the patch size.
        """
        self.config = dataclasses.replace(
            self.config, input_size=input_size, pos_interp_scale=pos_interp_scale
        )
        self.pos_embed = self._positions().to(self.pos_embed)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Set weights and buffers to the paper's initialisation, under which F is exactly 0.

        Residual branches start smaller with depth, 0.02 / sqrt(2 (i + 1)) for block i. Also
        fills a model that was built on the meta device and given memory by ``to_empty``.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
        self.pos_embed.copy_(self._positions())
        self.mask_token.zero_()
        self.x_embedder.initialise(generator)
        self.t_embedder.initialise(generator)
        self.y_embedder.initialise(generator)
        self.y_emb_preprocess.initialise(generator)
        self.pooled_y_emb_process.initialise(generator)
        for block in _typed(self.patch_mixer):
            block.initialise(0.02 / math.sqrt(2 * len(self.blocks)), generator)
        for i, block in enumerate(_typed(self.blocks)):
            block.initialise(0.02 / math.sqrt(2 * (i + 1)), generator)
        self.final_layer.initialise()

    def _read(self, y: Tensor, y_mask: Tensor | None) -> Text:
        if y.dim() == 4:
            y = y.squeeze(1)
        if y.dim() != 3 or y.shape[-1] != self.config.caption_width:
            raise ValueError(
                f"captions {tuple(y.shape)}: this model takes (B, L, {self.config.caption_width}); "
                "change caption_width or the text encoder"
            )
        y = self.y_embedder(y)
        bias = None if y_mask is None else _padding_bias(y_mask, y)
        y = self.y_emb_preprocess(y, bias)
        if y_mask is None:
            pooled = y.mean(dim=1)
        else:
            real = y_mask.to(y.dtype)
            pooled = torch.bmm(real[:, None], y).squeeze(1) / real.sum(dim=1, keepdim=True)
        y_mixer = self.patch_mixer_map_y(y)
        return Text(
            pooled=self.pooled_y_emb_process(pooled),
            mixer=[y_mixer] * len(self.patch_mixer),
            backbone=[y] * len(self.blocks),
            bias=bias,
        )

    def _positions(self) -> Tensor:
        config = self.config
        return position_table(config.width, config.grid, config.pos_interp_scale)[None]

    def _unpatchify(self, x: Tensor) -> Tensor:
        grid, patch, channels = self.config.grid, self.config.patch_size, self.config.in_channels
        x = x.view(-1, grid, grid, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, channels, grid * patch, grid * patch)


def _typed(blocks: nn.ModuleList) -> Iterable[DiTBlock]:
    return cast(Iterable[DiTBlock], blocks)  # nn.ModuleList forgets what it holds


def _keys_values(
    blocks: nn.ModuleList, captions: Sequence[Tensor | KeysValues]
) -> list[Tensor | KeysValues]:
    return [
        block.cross_attn.keys_values(caption)
        for block, caption in zip(_typed(blocks), captions, strict=True)
    ]


def _padding_bias(y_mask: Tensor, y: Tensor) -> Tensor:
    if y_mask.shape != y.shape[:2] or y_mask.dtype != torch.bool:
        raise ValueError(
            f"y_mask {tuple(y_mask.shape)} {y_mask.dtype}: give bool {tuple(y.shape[:2])}, "
            "True for real caption rows"
        )
    # Looking at values would stall a GPU; there an empty caption shows up as NaN.
    readable = y_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not bool(y_mask.any(dim=1).all()):
        raise ValueError("y_mask has a row without True: give a dropped caption one zero row")
    bias = torch.zeros(y_mask.shape, dtype=y.dtype, device=y.device)
    return bias.masked_fill_(~y_mask, -math.inf)[:, None, None, :]

"""What decides a MicroDiT's shape: sizes of the network and of each of its blocks. No torch here.

Architecture of Sehwag et al. 2024 (arXiv 2407.15811), layer-wise scaling of OpenELM (arXiv
2404.14619).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

CAPTION_FFN_MULTIPLIER = 4.0
DECODER_FFN_MULTIPLIER = 4.0
DECODER_HEADS = 16
"""Of MaskDiT's decoder, at every width."""

FeedForward = Literal["swiglu", "gelu"]

_COUNTS = (
    "patch_size",
    "in_channels",
    "width",
    "depth",
    "head_dim",
    "multiple_of",
    "mixer_width",
    "num_experts",
    "decoder_width",
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
    """Number of experts of its feed-forward; 0 is dense."""


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
    feed_forward: FeedForward = "swiglu"
    """Kind of the dense feed-forwards; experts are always GELU."""
    multiple_of: int = 256
    """Feed-forward widths are rounded up to a multiple of this."""
    mixer_width: int = 512
    mixer_depth: int = 4
    """Blocks that see all patches; 0 is no mixer, and masking is naive."""
    mixer_ffn_multiplier: float = 4.0
    num_experts: int = 8
    expert_capacity: float = 2.0
    """Experts that choose a token, on average."""
    moe_every: int = 2
    """Every n-th block has experts, the last backbone block never; 0 is dense throughout."""
    decoder_width: int = 512
    decoder_depth: int = 0
    """Blocks of MaskDiT's decoder (arXiv 2306.09305), 8 there; 0 is no decoder."""
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
        for name in ("mixer_depth", "moe_every", "decoder_depth"):
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
        kinds = get_args(FeedForward)
        remedy = f"choose {' or '.join(kinds)}"
        _require(self.feed_forward in kinds, "feed_forward", self.feed_forward, remedy)
        value = self.decoder_width
        remedy = f"choose a multiple of its {DECODER_HEADS} heads"
        _require(value % DECODER_HEADS == 0, "decoder_width", value, remedy)
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

    @property
    def output_width(self) -> int:
        """Width of the tokens that the final layer reads."""
        return self.decoder_width if self.decoder_depth else self.width

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

    def decoder_shape(self) -> BlockShape:
        """Sizes of each block of MaskDiT's decoder."""
        return self._block(self.decoder_width, 1.0, DECODER_FFN_MULTIPLIER, False)

    def _has_experts(self, index: int) -> bool:
        return self.moe_every > 0 and (index + 1) % self.moe_every == 0

    def _block(self, width: int, r_qkv: float, r_ffn: float, experts: bool) -> BlockShape:
        # An even number of heads, as OpenELM's groups need; a ratio of 1 keeps the width.
        pair = 2 * self.head_dim
        attn_width = width if r_qkv == 1 else pair * math.ceil(int(width * r_qkv) / pair)
        hidden = int(width * r_ffn)
        if self.feed_forward == "swiglu" and not experts:
            hidden = int(2 * hidden / 3)  # its three matrices then weigh as much as two
        ffn_width = self.multiple_of * math.ceil(hidden / self.multiple_of)
        return BlockShape(width, attn_width, ffn_width, self.num_experts if experts else 0)


MODELS: dict[str, DiTConfig] = {
    "MicroDiT_Tiny_2": DiTConfig(),
    "MicroDiT_XL_2": DiTConfig(width=1024, depth=28, head_dim=64, mixer_width=768, mixer_depth=6),
}
"""Configurations of the paper, at 256 px and 4 latent channels."""

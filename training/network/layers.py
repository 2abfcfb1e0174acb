"""The parts a MicroDiT block is made of: attention, feed-forward, embedders, position table.

Sub-module names are those of the released MicroDiT checkpoints (arXiv 2407.15811), so that
their state dicts load as they are. Shapes: B batch, T image tokens, L caption tokens,
d model width, A attention width, h head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.network.recompute import Normed, gelu_linear, swiglu, unit_norm

TIME_CHANNELS = 512
"""Channels of the sinusoid that encodes the noise level, at every model width."""
TIME_MAX_PERIOD = 10_000.0
POSITION_MAX_PERIOD = 10_000.0
INIT_STD = 0.02
"""Standard deviation of input projections at initialisation."""

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one cross-attention, each (B, A/h, L, h), keys already normalised."""


def layer_norm(width: int, eps: float) -> nn.LayerNorm:
    """Layer norm with a learned weight and no bias, the only affine norm in the model."""
    return nn.LayerNorm(width, eps=eps, bias=False)


def normal_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Normal initialisation in place.

    Not `nn.init.trunc_normal_`, as the published code has it: its cut at +-2 absolute is a hundred
    standard deviations away, where float32's inverse error function ends, so one weight in 17
    million comes out as exactly +-2.
    """
    nn.init.normal_(weight, std=std, generator=generator)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of q (B, H, T, h) to k and v (B, H, L, h), scaled by 1 / sqrt(h)."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # On CPUs the bfloat16 kernel's backward takes ten times as long as the float32 one,
        # more than bfloat16 saves in all matrix products of the model.
        bias = None if bias is None else bias.float()
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention with qk-norm over the whole projection, all heads together.

    The norm has no learned parameters. ``attn_width`` may be smaller than ``width``
    (layer-wise scaling, OpenELM, arXiv 2404.14619).
    """

    def __init__(self, width: int, attn_width: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.attn_width, self.head_dim, self.eps = attn_width, head_dim, eps
        self.qkv = nn.Linear(width, 3 * attn_width, bias=False)
        self.proj = nn.Linear(attn_width, width, bias=False)

    def forward(self, x: Normed, bias: Tensor | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d); ``bias`` (B, 1, 1, T) is added to the scores of each key."""
        q, k, v = x.project(self.qkv.weight, parts=3)
        q, k = unit_norm(q, self.eps), unit_norm(k, self.eps)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (q, k, v))
        return self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))

    def initialise(self, std_out: float, generator: torch.Generator | None) -> None:
        normal_(self.qkv.weight, INIT_STD, generator)
        normal_(self.proj.weight, std_out, generator)


class CrossAttention(nn.Module):
    """Multi-head attention from image tokens to caption tokens, always at full model width.

    Keys and values are a separate step because they depend on the caption alone: a sampler
    computes them once for all its steps.
    """

    def __init__(self, width: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.width, self.head_dim, self.eps = width, head_dim, eps
        self.q_linear = nn.Linear(width, width, bias=False)
        self.kv_linear = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def keys_values(self, y: Tensor | KeysValues) -> KeysValues:
        """Caption tokens y (B, L, d) -> keys and values; what are such already stays as it is."""
        if not isinstance(y, Tensor):
            return y
        k, v = self.kv_linear(y).chunk(2, dim=-1)
        return self._heads(unit_norm(k, self.eps)), self._heads(v)

    def forward(self, x: Normed, y: Tensor | KeysValues, bias: Tensor | None = None) -> Tensor:
        """x (B, T, d), y (B, L, d) -> (B, T, d); ``bias`` (B, 1, 1, L) is added to the scores."""
        k, v = self.keys_values(y)
        (q,) = x.project(self.q_linear.weight)
        q = self._heads(unit_norm(q, self.eps))
        return self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def initialise(self, std_out: float, generator: torch.Generator | None) -> None:
        normal_(self.q_linear.weight, INIT_STD, generator)
        normal_(self.kv_linear.weight, INIT_STD, generator)
        normal_(self.proj.weight, std_out, generator)


class SwiGLU(nn.Module):
    """Gated feed-forward, w3(silu(w1 x) * w2 x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Normed) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        a, b = x.project(self.w1.weight, self.w2.weight)
        return swiglu(a, b, self.w3.weight)

    def initialise(self, std_out: float, generator: torch.Generator | None) -> None:
        normal_(self.w1.weight, INIT_STD, generator)
        # w2 is an input matrix, yet the released recipe scales it like an output.
        normal_(self.w2.weight, std_out, generator)
        normal_(self.w3.weight, std_out, generator)

    def close(self) -> None:
        """Makes the output 0."""
        nn.init.zeros_(self.w3.weight)


class GeluMLP(nn.Module):
    """Plain feed-forward, w2 gelu(w1 x), the two matrices of every expert."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Normed) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        (a,) = x.project(self.w1.weight)
        return gelu_linear(a, self.w2.weight)

    def initialise(self, std_out: float, generator: torch.Generator | None) -> None:
        normal_(self.w1.weight, INIT_STD, generator)
        normal_(self.w2.weight, std_out, generator)

    def close(self) -> None:
        """Makes the output 0."""
        nn.init.zeros_(self.w2.weight)


FEED_FORWARDS: dict[str, type[SwiGLU] | type[GeluMLP]] = {"swiglu": SwiGLU, "gelu": GeluMLP}
"""Dense feed-forwards by the name that `DiTConfig.feed_forward` gives them."""


class CaptionMLP(nn.Module):
    """Linear, tanh-GELU, layer norm, linear: projects caption tokens and the pooled caption."""

    def __init__(self, width_in: int, width: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, width)
        self.norm = layer_norm(width, eps)
        self.fc2 = nn.Linear(width, width)

    def forward(self, y: Tensor) -> Tensor:
        """y (..., width_in) -> (..., width)."""
        return self.fc2(self.norm(F.gelu(self.fc1(y), approximate="tanh")))

    def initialise(self, generator: torch.Generator | None) -> None:
        normal_(self.fc1.weight, INIT_STD, generator)
        normal_(self.fc2.weight, INIT_STD, generator)


class CaptionEmbedder(nn.Module):
    """The caption projection under the name that released checkpoints give it."""

    def __init__(self, width_in: int, width: int, eps: float) -> None:
        super().__init__()
        self.y_proj = CaptionMLP(width_in, width, eps)

    def forward(self, y: Tensor) -> Tensor:
        """y (B, L, width_in) -> (B, L, d)."""
        return self.y_proj(y)

    def initialise(self, generator: torch.Generator | None) -> None:
        self.y_proj.initialise(generator)


class TimestepEmbedder(nn.Module):
    """Noise level -> vector: sinusoid of 512 channels, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_CHANNELS, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )

    def forward(self, c_noise: Tensor) -> Tensor:
        """c_noise (B,), which is ln(sigma)/4 and is not rescaled -> (B, d)."""
        half = TIME_CHANNELS // 2
        k = torch.arange(half, device=c_noise.device, dtype=c_noise.dtype)
        angle = c_noise[:, None] * torch.exp(k * (-math.log(TIME_MAX_PERIOD) / half))
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))

    def initialise(self, generator: torch.Generator | None) -> None:
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                normal_(layer.weight, INIT_STD, generator)


class PatchEmbed(nn.Module):
    """Cuts latents into p x p patches, row by row, and projects each to the model width."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        # A convolution only in name: it owns the weights under the checkpoints' key and shape.
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, S, S) -> (B, (S/p)^2, d)."""
        p = self.patch_size
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // p, p, width // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p)
        # One matrix product with a contiguous (B, T, d) result; a strided convolution would
        # give (B, d, S/p, S/p) and need a transposing copy.
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)

    def initialise(self, generator: torch.Generator | None) -> None:
        weight, bias = self.proj.weight, self.proj.bias
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1), generator=generator)
        if bias is not None:  # PyTorch's default for convolutions; the recipe does not zero it
            bound = weight[0].numel() ** -0.5
            nn.init.uniform_(bias, -bound, bound, generator=generator)


def position_table(width: int, grid: int, scale: float) -> Tensor:
    """Fixed 2-D sine-cosine positions of a square token grid, float32 (grid * grid, width).

    Coordinates are index / ``scale``: with ``scale`` 2 a grid twice as fine spans the same
    range, and its even rows and columns equal the coarse table. The first half of the channels
    encodes the column, the second the row (the order of MAE, arXiv 2111.06377), each as
    [sin, cos] over width / 4 frequencies. Computed in float64.
    """
    quarter = width // 4
    frequency = POSITION_MAX_PERIOD ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.outer(torch.arange(grid, dtype=torch.float64) / scale, frequency)
    axis = torch.cat((angle.sin(), angle.cos()), dim=-1)  # (grid, width / 2)
    column = axis[None, :, :].expand(grid, -1, -1)
    row = axis[:, None, :].expand(-1, grid, -1)
    return torch.cat((column, row), dim=-1).flatten(0, 1).float()

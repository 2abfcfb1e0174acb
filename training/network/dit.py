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

from training.network.blocks import CaptionBlock, DiTBlock, FinalLayer
from training.network.config import DiTConfig
from training.network.decoder import Decoder
from training.network.layers import (
    CaptionEmbedder,
    CaptionMLP,
    KeysValues,
    PatchEmbed,
    TimestepEmbedder,
    layer_norm,
    position_table,
)
from training.network.tokens import TokenMask

GRAPHS_PER_BLOCK = 512  # levels of a mask's schedule times captions' padded lengths; inference


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
            if width == mixer_width or not config.mixer_depth:
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
        self.final_layer = FinalLayer(config.output_width, config)
        self.decoder = Decoder(config) if config.decoder_depth else None
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
            mask: which patches are seen, and by what part of the network; None is all by all.

        Returns:
            F (B, C, S, S), 0 in dropped patches unless there is a decoder that fills them.

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
        x = self.x_embedder(x) + self.pos_embed
        if mask is not None and mask.skips == "network":
            x = mask.keep(x)
        x = self.patch_mixer_map_xin(x)
        for block, caption in zip(self.patch_mixer, text.mixer, strict=True):
            x = block(x, condition, caption, text.bias)
        if mask is not None and mask.skips == "backbone":
            x = mask.keep(x)  # before the projection, which then has fewer tokens to do
        x = self.patch_mixer_map_xout(x)
        x = self._backbone(x, condition, text, mask)
        return self._unpatchify(self._values(x, condition, mask))

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
        if self.decoder is not None:
            self.decoder.set_positions(self.config)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each block for itself with torch.compile; weights and their names stay.

        Blocks of a kind share a graph, so the first step takes a minute where the whole network
        takes ten, and a sampler that calls `forward` runs the same compiled blocks.
        """
        blocks = [*self.patch_mixer, *self.blocks, self.y_emb_preprocess]
        # All blocks have one forward method, and a graph of it for each of their sizes, for each
        # number of kept tokens and for inference. Past the limit it would go on uncompiled.
        limit = GRAPHS_PER_BLOCK * len(blocks)
        settings = torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, limit)
        settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 2 * limit)
        settings.fail_on_recompile_limit_hit = True
        for block in blocks:
            block.compile(dynamic=False, backend=backend)

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
        if self.decoder is not None:
            self.decoder.set_positions(self.config)
            self.decoder.initialise(generator)

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

    def _backbone(self, x: Tensor, condition: Tensor, text: Text, mask: TokenMask | None) -> Tensor:
        """Tokens after the mixer -> tokens after the backbone; all of them, if some bypass blocks
        and rejoin."""
        first, last = mask.skips if mask is not None and isinstance(mask.skips, tuple) else (-1, -1)
        bypassed = x
        for i, (block, caption) in enumerate(zip(self.blocks, text.backbone, strict=True)):
            if mask is not None and i == first:
                bypassed, x = x, mask.keep(x)
            x = block(x, condition, caption, text.bias)
            if mask is not None and i == last:
                x = mask.rejoin(x, bypassed)
        return x

    def _values(self, x: Tensor, condition: Tensor, mask: TokenMask | None) -> Tensor:
        """Tokens after the backbone -> latent values of all patches, (B, T, p * p * C)."""
        dropped = mask if mask is not None and isinstance(mask.skips, str) else None
        if self.decoder is not None:
            return self.final_layer(self.decoder(x, condition, dropped), condition)
        x = self.final_layer(x, condition)
        return x if dropped is None else dropped.restore(x, self.mask_token)

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

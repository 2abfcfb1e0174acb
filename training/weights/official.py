"""Checkpoints of the official MicroDiT code: read as data, recognised by their shapes, written.

The released files hold the network's state dict alone; the official trainer's own hold it among
frozen encoders, under `state.model` with the prefix "dit.". Both are read, and nothing of a file is
executed. Facts of the four released files: SonyResearch/micro_diffusion, README.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from pipeline.core.errors import SettingError
from pipeline.core.manifest import VaeFacts
from training.network.config import MODELS, DiTConfig
from training.network.layers import position_table
from training.weights import safe_load
from training.weights.tensors import read_tensors, require_fit, shapes

PREFIX = "dit."  # of the network, in checkpoints of the official trainer and of this one
BASE_GRID = 16  # patches along a side at 256 px, where positions have scale 1
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")  # DDP's, compile's and FSDP's, in names
_POSITION_TOLERANCE = 1e-5  # float32 of a table computed in float64, or bfloat16's own below


@dataclass(frozen=True)
class Official:
    """A state dict under the official names, and what was beside it."""

    tensors: dict[str, Tensor]
    ignored: int
    """Tensors of frozen encoders in the same file."""


def shift_note(vae: VaeFacts) -> str:
    """What to tell a user whose weights cross over with a VAE that shifts; "" for the others.

    The official code scales latents and never shifts them; training here does both.
    """
    if not vae.shift:
        return ""
    return (
        f"; the official code leaves out {vae.name}'s shift_factor {vae.shift:g}, training here "
        "applies it, so the other side decodes colours off by as much"
    )


def read(path: Path) -> Official:
    """The network's tensors of a `.pt` or `.safetensors` file, mapped into memory, on the CPU.

    Raises:
        SettingError: not there, truncated, no checkpoint, or holding more than data.
    """
    whole = _load(path)
    if isinstance(whole, dict) and isinstance(whole.get("state"), dict):
        whole = whole["state"].get("model")
    keyed = isinstance(whole, dict) and all(isinstance(name, str) for name in whole)
    if not keyed or not all(isinstance(v, Tensor) for v in whole.values()):
        raise SettingError(
            f"{path}: no state dict, nor a Composer checkpoint with one under state.model"
        )
    named = {_plain(name): value for name, value in whole.items()}
    if len(named) < len(whole):
        raise SettingError(f"{path}: has a tensor twice, with and without {' or '.join(_WRAPPERS)}")
    if any(name.startswith(PREFIX) for name in named):
        own = {n.removeprefix(PREFIX): v for n, v in named.items() if n.startswith(PREFIX)}
    else:
        own = named
    if "x_embedder.proj.weight" not in own:
        first = min(own, default="nothing")
        raise SettingError(f"{path}: no MicroDiT: x_embedder.proj.weight is missing (has {first})")
    return Official(own, len(named) - len(own))


def recognise(path: Path, tensors: dict[str, Tensor], base: DiTConfig | None = None) -> DiTConfig:
    """The network that these tensors are of.

    Args:
        base: its sizes where it is none of the paper's networks; channels, caption width and
            resolution are always read from the tensors.

    Raises:
        SettingError: no known network, or one tensor too many, too few, or of another shape; names
            the first.
    """
    embed, positions = tensors["x_embedder.proj.weight"], tensors.get("pos_embed")
    caption = tensors.get("y_embedder.y_proj.fc1.weight")
    if positions is None or caption is None:
        raise SettingError(f"{path}: no MicroDiT: pos_embed or y_embedder.y_proj is missing")
    for key, value, axes in (
        ("x_embedder.proj.weight", embed, 4),
        ("pos_embed", positions, 3),
        ("y_embedder.y_proj.fc1.weight", caption, 2),
    ):
        if value.dim() != axes:
            raise SettingError(
                f"{path}: no MicroDiT: {key} is {tuple(value.shape)}, expected {axes} axes"
            )
    name = "the given sizes"
    if base is None:
        found = (len(embed), _count(tensors, "blocks"), _count(tensors, "patch_mixer"))
        known = {(c.width, c.depth, c.mixer_depth): n for n, c in MODELS.items()}
        if found not in known:
            raise SettingError(
                f"{path}: width {found[0]}, {found[1]} blocks and {found[2]} mixer blocks are of "
                f"none of {', '.join(MODELS)}; give the sizes with --arch FILE.yaml"
            )
        name = known[found]
        base = MODELS[name]
    try:
        config = dataclasses.replace(
            base,
            in_channels=embed.shape[1],
            caption_width=caption.shape[1],
            input_size=math.isqrt(positions.shape[1]) * base.patch_size,
        )
    except ValueError as error:
        raise SettingError(f"{path}: not {name}: {error}") from error
    require_fit(path, tensors, config, name)
    return dataclasses.replace(config, pos_interp_scale=_scale(path, positions, config))


def write(path: Path, tensors: dict[str, Tensor], config: DiTConfig) -> None:
    """A file that the official code loads with `model.dit.load_state_dict(torch.load(…))`.

    Names are in the order of the official state dict. It appears whole under its name, or not at
    all.

    Raises:
        OSError: no room, or no right to write there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        torch.save({name: tensors[name] for name in shapes(config)}, part)
        os.replace(part, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(" ".join(str(error).split())[:200]) from error
    finally:
        part.unlink(missing_ok=True)


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        return safe_load.load(path, _data_types())
    except FileNotFoundError as error:
        raise SettingError(f"{path}: no such file") from error


class _Unread:
    """Stands for the numpy arrays in a checkpoint's random states, which nobody reads: a broken one
    of numpy's own would be an error when its memory is freed."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _data_types() -> list[Any]:
    """What Composer's checkpoints hold beside tensors and plain values: times, and numpy arrays in
    their random states. The reconstructing function had another place before numpy 2."""
    places = ("ndarray", "dtype", "core.multiarray._reconstruct", "_core.multiarray._reconstruct")
    return [
        datetime.timedelta,
        TorchVersion,
        *((_Unread, f"numpy.{place}") for place in places),
    ]


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _count(tensors: dict[str, Tensor], group: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{group}.")})


def _scale(path: Path, positions: Tensor, config: DiTConfig) -> float:
    """What the table's coordinates were divided by: it is stored, not said."""
    stored = positions[0].float()
    coarse = positions.dtype in (torch.bfloat16, torch.float16)
    for scale in (config.grid / BASE_GRID, 1.0, config.pos_interp_scale):
        table = position_table(config.width, config.grid, scale)
        expected = table.to(positions.dtype).float() if coarse else table
        if (stored - expected).abs().max() <= _POSITION_TOLERANCE:
            return scale
    raise SettingError(
        f"{path}: pos_embed is no sine-cosine table of {config.grid} x {config.grid} patches at "
        f"scale 1 or {config.grid / BASE_GRID:g}"
    )

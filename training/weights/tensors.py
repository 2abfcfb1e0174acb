"""Whether tensors are those of a network: by name, shape, type, and by being numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.core.errors import SettingError
from training.network.config import DiTConfig
from training.network.dit import MicroDiT
from training.weights.weights_metadata import require_content

Shape = tuple[int, ...]


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the types in which they are stored.

    Raises:
        SettingError: no such file, or no safetensors.
    """
    try:
        require_content(path)
        return load_file(path, device)
    except FileNotFoundError as error:
        raise SettingError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        text = " ".join(str(error).split())[:120]
        raise SettingError(f"{path}: truncated, or no safetensors file ({text})") from error


def shapes(config: DiTConfig) -> dict[str, Shape]:
    """Of a network's parameters and buffers, by name, in the order of their registration.

    Raises:
        ValueError: sizes beyond what torch can count.
    """
    try:
        with torch.device("meta"):
            return {n: tuple(v.shape) for n, v in MicroDiT(config).state_dict().items()}
    except (RuntimeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:120]) from error


def require_fit(path: Path, tensors: Mapping[str, Tensor], config: DiTConfig, network: str) -> None:
    """That these are the tensors of a network, plain ones of floating point.

    Args:
        network: what to call it.

    Raises:
        SettingError: names the first tensor too many, too few, or of another shape or type.
    """
    blocks = config.depth + config.mixer_depth + config.decoder_depth
    if blocks > len(tensors):  # before as many are made to be compared
        raise SettingError(f"{path}: not {network}: {len(tensors)} tensors for {blocks} blocks")
    try:
        expected = shapes(config)
    except ValueError as error:
        raise SettingError(f"{path}: no network of these sizes ({error})") from error
    for key in [*expected, *sorted(tensors.keys() - expected.keys())]:
        value = tensors.get(key)
        own = None if value is None else tuple(value.shape)
        if own != expected.get(key):
            raise SettingError(
                f"{path}: not {network}: {key} is {_shown(own)}, expected "
                f"{_shown(expected.get(key))}"
            )
        if value is not None and not (value.is_floating_point() and value.layout == torch.strided):
            kind = str(value.dtype).removeprefix("torch.")
            raise SettingError(f"{path}: {key} is of type {kind}; weights are dense floating point")


def require_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """That no value is NaN or infinite.

    Raises:
        SettingError: names the first tensor with such values.
    """
    for name, value in tensors.items():
        wrong = value.numel() - int(torch.isfinite(value.float()).sum())
        if wrong:
            raise SettingError(
                f"{path}: {wrong} of {value.numel()} values of {name} are NaN or infinite; the "
                "file is damaged, or its training diverged: take another one"
            )


def _shown(shape: Shape | None) -> str:
    return "missing" if shape is None else str(shape)

"""A file of torch.save read as data: no code of it is run; what is wrong with it is one line."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.core.errors import SettingError


def load(path: Path, types: Sequence[Any] = ()) -> Any:
    """What was saved, on the CPU, its tensors mapped into memory.

    Args:
        types: what the file may hold beside tensors and plain values; see
            `torch.serialization.add_safe_globals`.

    Raises:
        FileNotFoundError: it is not there.
        SettingError: truncated, no file of torch, or holding objects that are more than data.
    """
    try:
        with torch.serialization.safe_globals(list(types)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # it is refused anyway
            mapped = zipfile.is_zipfile(path)  # files of before torch 1.6 are not
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise
    except IsADirectoryError as error:
        raise SettingError(f"{path}: is a folder; give the checkpoint's file") from error
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise SettingError(
                f"{path}: holds pickled objects ({refused[1]}), which may run code, and was not "
                "opened; use a file of tensors alone"
            ) from error
        raise SettingError(f"{path}: truncated, or no checkpoint of torch") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        text = " ".join(str(error).split())[:120]
        raise SettingError(f"{path}: truncated, or no checkpoint of torch ({text})") from error

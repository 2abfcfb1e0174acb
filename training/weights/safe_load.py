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
from training.weights.weights_metadata import require_content


def load(path: Path, types: Sequence[Any] = ()) -> Any:
    """What was saved, on the CPU, its tensors mapped into memory.

    Args:
        types: what the file may hold beside tensors and plain values; see
            `torch.serialization.add_safe_globals`.

    Raises:
        FileNotFoundError: it is not there.
        SettingError: truncated, no file of torch, or holding objects that are more than data.
    """
    require_content(path)
    try:
        with torch.serialization.safe_globals(list(types)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd bytes in it: whatever they are, it is judged
            mapped = zipfile.is_zipfile(path)  # files of before torch 1.6 are not
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise
    except Exception as error:
        # A pickle is a program: a broken one fails in whatever way its instructions do.
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise SettingError(
                f"{path}: holds pickled objects ({refused[1]}), which may run code, and was not "
                "opened; use a file of tensors alone"
            ) from error
        text = " ".join(str(error).split())[:120] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's own text is advice to run it
            text = "no pickle of tensors"
        raise SettingError(f"{path}: truncated, or no checkpoint of torch ({text})") from error

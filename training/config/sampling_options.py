"""Arguments of the commands that paint, checked before anything heavy is loaded."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import SettingError

if TYPE_CHECKING:
    import torch


MOST = 1_000_000  # steps, pictures of a batch or split: beyond that a number is a slip


def check(options: argparse.Namespace, counts: Sequence[str]) -> None:
    """Numbers and the folder for results.

    Args:
        counts: names of the options that say how many.

    Raises:
        SettingError: names option, value and remedy.
    """
    for name in counts:
        value = getattr(options, name)
        if not 1 <= value <= MOST:
            raise SettingError(f"--{name.replace('_', '-')} {value}: use 1 to {MOST}")
    if not (math.isfinite(options.guidance) and options.guidance >= 0):
        raise SettingError(
            f"--guidance {options.guidance}: give a number of 0 or more; 1 is no guidance"
        )
    require_folder("--out", local("--out", options.out))


def local(option: str, text: str) -> Path:
    """
    Raises:
        SettingError: nothing, or a URL, which as a path would be a folder named `s3:`.
    """
    if not text or "://" in text:
        raise SettingError(f'{option} "{text}": give a path on this machine')
    return Path(text)


def require_folder(option: str, path: Path) -> None:
    """That a folder is there or can be made.

    Raises:
        SettingError: a file is in the way, or nothing may be written there.
    """
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:
        raise SettingError(f"{option} {path}: cannot be a folder ({error.strerror})") from error
    if not there.is_dir():
        raise SettingError(f"{option} {path}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SettingError(f"{option} {path}: {there} may not be written to; name another folder")


def device_of(name: str) -> torch.device:
    """The device of that name; "" is a GPU where there is one.

    Raises:
        SettingError: none of that name is here.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # each kind of device has its own
        text = " ".join(str(error).split())[:120]
        raise SettingError(
            f"--device {name}: cannot be used here ({text}); use cpu, or leave it out"
        ) from error
    return device if device.type != "cpu" else torch.device("cpu")  # there is no cpu:7


def read_prompts(arguments: Sequence[str]) -> list[str]:
    """Texts as they are; an argument that is a file gives a prompt a line, empty lines aside.

    Raises:
        SettingError: an empty text, none at all, a file that is no text, or what looks like the
            name of a file that is not there.
    """
    prompts: list[str] = []
    for argument in arguments:
        lines = _lines(argument)
        if lines is not None:
            prompts += [line.strip() for line in lines if line.strip()]
            continue
        _require_text(argument)
        prompts.append(argument.strip())
    if not prompts:
        raise SettingError("--prompts: give texts, or a file with one a line")
    return prompts


def _lines(argument: str) -> list[str] | None:
    """Of the file of that name; None where there is none."""
    path = Path(os.path.expanduser(argument))
    try:
        if not path.exists() or (path.is_dir() and "/" not in argument):
            return None
    except (OSError, ValueError):  # a prompt that is no file's name, or too long for one
        return None
    try:
        return path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--prompts {argument}: cannot be read as text ({error})") from error


def _require_text(argument: str) -> None:
    if not argument.strip():
        raise SettingError("--prompts: one of them is empty; give texts, or a file with one a line")
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        shown = argument.encode("ascii", "backslashreplace").decode()
        raise SettingError(f"--prompts {shown}: is no UTF-8 text") from error
    if _FILE.search(argument) or ("/" in argument and not re.search(r"\s", argument)):
        path = Path(argument)
        try:
            names = [p.name for p in path.parent.iterdir()]
        except OSError:
            names = []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f'; did you mean "{path.with_name(near[0])}"?' if near else ""
        raise SettingError(
            f"--prompts {argument}: no such file{hint} (a prompt that looks like a file's name: "
            "write it into a file)"
        )


_FILE = re.compile(r"^\S+\.[A-Za-z][A-Za-z0-9]{1,4}$|\.(txt|csv|tsv|json|jsonl|md|ya?ml)$", re.I)

"""Whether the files of a run are whole, told without torch: each answer is what is wrong, or "".

What may not be read, or is no file, is not damaged: that raises OSError.
"""

from __future__ import annotations

import functools
import json
import zipfile
from pathlib import Path
from typing import Any

from pipeline.core.errors import SettingError


def weights_fault(path: Path) -> str:
    """Of a safetensors file that is there: its header says how long it has to be."""
    from safetensors import SafetensorError, safe_open

    open(path, "rb").close()
    try:
        with safe_open(path, "np"):
            return ""
    except (OSError, SafetensorError) as error:
        return "it is empty" if not path.stat().st_size else f"it is damaged ({_line(error)})"


def checkpoint_fault(path: Path) -> str:
    """Of a checkpoint that is there: torch writes a zip file, with a checksum of each part, which
    torch itself does not look at. Read once for as long as the file stays the same."""
    open(path, "rb").close()
    stat = path.stat()
    if not stat.st_size:
        return "it is empty"
    return _checkpoint_fault(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(16)
def _checkpoint_fault(path: Path, inode: int, size: int, mtime_ns: int) -> str:
    try:
        if not zipfile.is_zipfile(path):
            return "it is cut off, or no checkpoint"
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except Exception as error:  # of a damaged directory zipfile raises whatever its bytes lead to
        return f"it is damaged ({_line(error)})"
    return f"it is damaged ({broken} differs from its checksum)" if broken else ""


def record(data: bytes, where: object, kind: type[Any], remedy: str) -> Any:
    """What a JSON file of the run holds: one object, or one list.

    Args:
        where: the file, for the message; `remedy` says what can be done.

    Raises:
        SettingError: it holds none.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        what = f"damaged, not JSON ({_line(error)})" if data.strip() else "empty"
        raise SettingError(f"{where}: {what}; {remedy}") from error
    if not isinstance(found, kind):
        shown = type(found).__name__
        raise SettingError(
            f"{where}: damaged, expected a {kind.__name__} in it, found a {shown}; {remedy}"
        )
    return found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__

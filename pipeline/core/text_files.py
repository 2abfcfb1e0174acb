"""Settings files that were not saved as UTF-8."""

from __future__ import annotations

import codecs
from pathlib import Path

from pipeline.core.errors import SettingError

#: Marks at a file's beginning, the longer ones first: one of UTF-32 begins like one of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def read_yaml_text(path: Path) -> str:
    """The text of a YAML file: UTF-8, UTF-16 or UTF-32, by its mark or by where zeros are in its
    first character, as YAML 1.2 (section 5.2) has it.

    Raises:
        OSError: it cannot be read.
        SettingError: it is in another encoding.
    """
    data = path.read_bytes()
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark) or _by_zeros(data[:4])
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = len(mark) + error.start
        line, shown = data[:place].count(b"\n") + 1, data[place : place + 1].hex()
        raise SettingError(
            f"{path}: line {line} is not {encoding.upper()} (byte 0x{shown}); save the file as "
            "UTF-8"
        ) from error


def _by_zeros(start: bytes) -> str:
    zeros = [byte == 0 for byte in start]
    if zeros[:3] == [True] * 3:
        return "utf-32-be"
    if zeros[1:] == [True] * 3:
        return "utf-32-le"
    if zeros[:1] == [True]:
        return "utf-16-be"
    return "utf-16-le" if zeros[1:2] == [True] else "utf-8"

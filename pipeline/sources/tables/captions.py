"""Captions as sources find them: bytes of a text file, or one of several."""

from __future__ import annotations

import codecs
import hashlib

#: First bytes -> how the rest is written. Windows' editors leave them.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def caption_text(data: bytes) -> str:
    """A text file's content: UTF-8, or what its byte order mark says.

    Bytes that are none become U+FFFD: a caption with one letter lost is better than no picture.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    return data.decode(encoding, "replace").removeprefix("\ufeff")


def choose(captions: tuple[str, ...], seed: int, key: str) -> str:
    """One of the captions, which (seed, key) alone decide."""
    digest = hashlib.sha256(f"caption:{seed}:{key}".encode()).digest()
    return captions[int.from_bytes(digest[:8], "big") * len(captions) >> 64]

"""Texts as people's files hold them: which encoding it is, and one of several captions."""

from __future__ import annotations

import codecs
import hashlib
import unicodedata
from typing import Annotated

from pydantic import AfterValidator

#: First bytes -> how the rest is written. Windows' editors leave them. UTF-32's begins as UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


_UNWRITTEN = ("Cc", "Cn", "Co", "Cs")  # controls, unassigned, private, halves of pairs


class BadText(ValueError):
    """Bytes that are no text in the encoding they should have; the message says which and where."""


def _known(name: str) -> str:
    if name != "auto":
        try:
            codecs.lookup(name)
        except LookupError:
            raise ValueError("write auto, or an encoding's name, e.g. cp1252, shift_jis") from None
    return name


#: A setting: "auto" is UTF-8, or UTF-16 with a mark or with the zeros that it has in most texts.
Encoding = Annotated[str, AfterValidator(_known)]


def encoding_of(start: bytes, stated: str = "auto") -> str:
    """How a text is written, by its first bytes; a mark says more than the setting."""
    marked = next((name for mark, name in _MARKS if start.startswith(mark)), None)
    if marked is not None or stated != "auto":
        return marked or stated
    # Letters of most scripts leave every other byte of UTF-16 zero; no other text has such bytes.
    return _utf16(start, 0.4) or "utf-8"


def caption_text(data: bytes, encoding: str = "auto") -> str:
    """A text file's content.

    Raises:
        BadText: it is not in that encoding. A guess would be wrong now and then, and a caption
            with holes trains as well as a whole one, on what nobody wrote.
    """
    name = encoding_of(data, encoding)
    try:
        text = data.decode(name)
    except UnicodeDecodeError as error:
        # Of scripts whose letters have no zeros, spaces and line ends still have.
        name16 = _utf16(data, 0.0) if encoding == "auto" and name == "utf-8" else None
        if name16 is not None and len(data) % 2 == 0:
            return data.decode(name16, "replace")
        raise BadText(bad_text(name, encoding, data[error.start], error.start)) from None
    return text.removeprefix("\ufeff")


def bad_text(name: str, stated: str, byte: int, place: int) -> str:
    remedy = (
        "save it as UTF-8, or set encoding, e.g. cp1252" if stated == "auto" else "see encoding"
    )
    return f"no {name}: byte 0x{byte:02x} at {place}; {remedy}"


def _utf16(data: bytes, least: float) -> str | None:
    """Which UTF-16 without a mark a text is, if any: by its zeros, in at least this share of its
    units, and nothing in it that no text has."""
    high, low = data[1::2].count(0), data[::2].count(0)
    if not (high or low) or (high and low) or (high or low) < least * (len(data) // 2):
        return None
    name = "utf-16-le" if high else "utf-16-be"
    text = data[: len(data) // 2 * 2].decode(name, "replace")
    odd = (c for c in text[:-1] + text[-1:].replace("\ufffd", "") if not _written(c))
    return None if any(odd) else name


def _written(letter: str) -> bool:
    return letter in "\t\r\n" or (
        letter != "\ufffd" and unicodedata.category(letter) not in _UNWRITTEN
    )


def choose(captions: tuple[str, ...], seed: int, key: str) -> str:
    """One of the captions, which (seed, key) alone decide."""
    digest = hashlib.sha256(f"caption:{seed}:{key}".encode()).digest()
    return captions[int.from_bytes(digest[:8], "big") * len(captions) >> 64]

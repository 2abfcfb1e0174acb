"""What JPEG, PNG and WebP files hold beside their pixels, taken out without decoding one.

What stays: how the picture is turned, its colour profile, and what decides pixels. What goes: EXIF
with its place, time and camera, XMP, IPTC, comments, thumbnails, further pictures (MPO), makers'
own segments, and whatever lies behind the picture's end.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
#: Chunks that decide pixels or their colours; sizes in print stay too, as JFIF's do.
_CHUNKS = (
    *(b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT"),
    *(b"cICP", b"mDCV", b"cLLI", b"pHYs", b"acTL", b"fcTL", b"fdAT"),
)
_WEBP = (b"VP8X", b"ICCP", b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF")
_EXIF_FLAG, _XMP_FLAG = 0x08, 0x04  # of VP8X
#: After a scan's header: the next marker that is neither data (FF 00), a restart nor padding.
_AFTER_SCAN = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")


class _Odd(ValueError):
    """A file that is not put together as its format says."""


def without(data: bytes, orientation: int = 1, profile: bool = False) -> bytes | None:
    """The file without its metadata, the very same bytes where it has none.

    Args:
        orientation: how the picture is turned, 1 to 8; what is not 1 is written down anew.
        profile: the colour profile goes as well.

    Returns:
        None for a file that is no JPEG, PNG or WebP, or not put together as such.
    """
    try:
        if data[:2] == b"\xff\xd8":
            return b"".join(_jpeg(data, orientation, profile))
        if data[:8] == _PNG:
            return b"".join(_png(data, orientation, profile))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data, orientation, profile)
    except (_Odd, struct.error, IndexError):
        return None
    return None


def _jpeg(data: bytes, orientation: int, profile: bool) -> Iterator[bytes]:
    yield data[:2]
    if orientation != 1 and not data.startswith(b"\xff\xe0", 2):
        yield _segment(orientation)
    at, first = 2, True
    while True:
        if data[at] != 0xFF:
            raise _Odd
        begin = at
        while data[at] == 0xFF:  # any number of them may stand before a marker
            at += 1
        marker, at = data[at], at + 1
        if marker == 0xD9:
            yield b"\xff\xd9"
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            raise _Odd  # without a length: none has a place here
        end = at + int.from_bytes(data[at : at + 2], "big")
        if end < at + 2 or end > len(data):
            raise _Odd
        kept = _kept(marker, data[at + 2 : end], profile)
        if kept is True:
            yield data[begin:end]
        elif kept:
            yield b"\xff" + bytes([marker]) + (len(kept) + 2).to_bytes(2, "big") + kept
        if first and orientation != 1 and marker == 0xE0:
            yield _segment(orientation)  # JFIF's own segment has to be the first
        at, first = end, False
        if marker == 0xDA:
            found = _AFTER_SCAN.search(data, at)
            if found is None:
                raise _Odd
            yield data[at : found.start()]
            at = found.start()


def _kept(marker: int, body: bytes, profile: bool) -> bool | bytes:
    """Whether a JPEG's segment stays; or what stays of it."""
    if marker == 0xE0 and body[:5] == b"JFIF\0":
        # With its thumbnail's size set to nothing, and the thumbnail cut off.
        return True if body[12:] == b"\0\0" else body[:12].ljust(12, b"\0") + b"\0\0"
    if marker == 0xE2 and body[:12] == b"ICC_PROFILE\0":
        return not profile
    if marker == 0xEE and body[:5] == b"Adobe":
        return True if len(body) <= 12 else body[:12]  # which colours the components are
    return not (0xE0 <= marker <= 0xEF or marker == 0xFE)


def _segment(orientation: int) -> bytes:
    body = b"Exif\0\0" + _exif(orientation)
    return b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body


def _exif(orientation: int) -> bytes:
    """A TIFF of one tag."""
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"MM\0*\0\0\0\x08\0\x01" + entry + b"\0\0\0\0"


def _png(data: bytes, orientation: int, profile: bool) -> Iterator[bytes]:
    yield _PNG
    at, turned = 8, orientation == 1
    while True:
        length = int.from_bytes(data[at : at + 4], "big")
        name, end = data[at + 4 : at + 8], at + 12 + length
        if len(name) < 4 or end > len(data):
            raise _Odd
        if name == b"IDAT" and not turned:
            body = b"eXIf" + _exif(orientation)
            yield struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
            turned = True
        if name in _CHUNKS and not (profile and name == b"iCCP"):
            yield data[at:end]
        at = end
        if name == b"IEND":
            return


def _webp(data: bytes, orientation: int, profile: bool) -> bytes:
    chunks: list[tuple[bytes, bytes]] = []
    at, whole = 12, 8 + int.from_bytes(data[4:8], "little")
    if whole > len(data):
        raise _Odd
    while at + 8 <= whole:
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + length > whole:
            raise _Odd
        if name in _WEBP and not (profile and name == b"ICCP"):
            chunks.append((name, data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    if not chunks:
        raise _Odd
    if chunks[0][0] == b"VP8X":
        body = chunks[0][1]
        flags = body[0] & ~(_EXIF_FLAG | _XMP_FLAG) & ~(0x20 if profile else 0)
        flags |= _EXIF_FLAG if orientation != 1 else 0
        chunks[0] = (b"VP8X", bytes([flags]) + body[1:])
        if orientation != 1:
            chunks.append((b"EXIF", _exif(orientation)))
    body = b"".join(n + len(c).to_bytes(4, "little") + c + b"\0" * (len(c) % 2) for n, c in chunks)
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body

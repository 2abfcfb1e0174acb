"""Colour profiles made by hand, as cameras, phones and presses have them."""

from __future__ import annotations

import itertools
import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def linear(values: np.ndarray) -> np.ndarray:
    """sRGB's curve, 0 to 1 to light."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def from_linear(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light.clip(0) ** (1 / 2.4) - 0.055)


def p3_as_srgb(pixels: np.ndarray) -> np.ndarray:
    """What Display P3 numbers are in sRGB: (…, 3) of 0 to 255, by the formula."""
    xyz = linear(pixels / 255) @ np.array(P3)
    return 255 * from_linear(xyz @ np.linalg.inv(np.array(SRGB))).clip(0, 1)


def rgb(colorants: tuple = P3, gamma: float | None = None) -> bytes:
    """A display's: colorants in D50, and sRGB's curve or a power."""
    table = (65535 * linear(np.linspace(0, 1, 1024))).round().astype(int)
    curve = _curve(table) if gamma is None else _gamma(gamma)
    tags = {b"wtpt": _xyz(D50)}
    tags |= {b"%cXYZ" % c: _xyz(xyz) for c, xyz in zip(b"rgb", colorants, strict=True)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags | {b"%cTRC" % c: curve for c in b"rgb"})


def grey(gamma: float) -> bytes:
    tags = {b"wtpt": _xyz(D50), b"kTRC": _gamma(gamma)}
    return _profile(b"mntr", b"GRAY", b"XYZ ", tags)


def press() -> bytes:
    """CMYK whose cyan is a dull blue: a table of the 16 corners, in Lab."""
    corners = []
    for c, m, y, k in itertools.product((0, 1), repeat=4):
        lightness = max(0, 100 - 40 * c - 45 * m - 8 * y - 85 * k)
        corners += [lightness * 255 / 100, 128 - 10 * c + 60 * m, 128 - 20 * c + 70 * y]
    table = bytes(round(min(255, max(0, v))) for v in corners)
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * n for n in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + table + identity * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(D50), b"A2B0": lut})


def _profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    head = bytearray(128)
    head[8:12] = b"\x02\x40\0\0"
    head[12:24] = kind + space + pcs
    head[36:40] = b"acsp"
    head[68:80] = b"".join(map(_fixed, D50))
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    whole = bytes(head) + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: tuple) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _curve(values: np.ndarray) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">I", len(values)) + values.astype(">u2").tobytes()


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(value * 256)) + b"\0\0"

"""Any picture that Pillow opens as RGB: each mode and depth by its meaning (docs/download.md).

A picture whose numbers have no agreed meaning is refused: a guess would be kept as a good sample.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core import colour
from pipeline.core.errors import BadPicture

_PADDED = ("BMP", "DIB", "TIFF")  # formats whose fourth channel may be nothing but padding
_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF tags
_SEPARATE = 2
_SIZ = b"\xff\x4f\xff\x51"  # how a JPEG 2000's own header begins
_SIGNED = 2
_WHITE_IS_ZERO = 0
_SLACK = 1e-3  # by which a float picture may leave 0 to 1


def to_rgb(image: Image.Image, data: bytes | None = None) -> tuple[Image.Image, str]:
    """A picture in any mode as RGB in sRGB on white, and what became of its colour profile.

    Args:
        data: the file, where it is at hand: what is transparent in a 16-bit PNG is told from it.

    Returns:
        The picture, not yet upright; colour.CONVERTED, colour.IGNORED, or "".

    Raises:
        BadPicture: "undecodable", where its numbers have no agreed meaning.
    """
    raw = _raw_mode(image)
    profile = image.info.get("icc_profile")  # Pillow may forget it with the first conversion
    if _deep_planes(image):
        _read_whole_samples(image)
    image.load()
    _refuse_wrapped(image, data)
    base, alpha = _planes(image, raw, data)
    shown, note = colour.to_srgb(base, profile)
    if alpha is not None:
        white = Image.new("RGB", shown.size, "white")
        shown = Image.composite(shown, white, alpha)
    return shown, note


def base_mode(image: Image.Image) -> str:
    """The mode in which a picture's profile applies, by its header."""
    if image.mode in ("CMYK", "LAB"):
        return image.mode
    return "L" if image.mode[:1] in ("1", "L", "I", "F") else "RGB"


def once_misread(image: Image.Image) -> bool:
    """Whether the first version gave other pixels of it: by its header, but for padded ones."""
    if _deep_key(image, _raw_mode(image)) is not None or _deep_planes(image):
        return True
    if colour.changes(image.info.get("icc_profile"), base_mode(image)):
        return True
    if image.mode in ("F", "LAB") or (image.mode == "I" and image.format == "TIFF"):
        return True
    if image.mode.startswith("I;16") and image.format == "TIFF":
        return _tag(image, _BITS) != (16,) or _tag(image, _PHOTOMETRIC) == (_WHITE_IS_ZERO,)
    if image.mode == "RGBA" and image.format in _PADDED:
        return image.getchannel("A").getextrema() == (0, 0)
    return _SIGNED in _tag(image, _SAMPLE_FORMAT)


def _planes(
    image: Image.Image, raw: str, data: bytes | None
) -> tuple[Image.Image, Image.Image | None]:
    """Colours in mode RGB, L, CMYK or LAB; and opacity in L where not all is opaque."""
    mode = image.mode
    if mode in ("1", "L"):
        _refuse_signed(image)
        grey = image.convert("L")
        return grey, _keyed(image, raw, np.asarray(grey)[..., None])
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _grey(image, raw)
    if mode in ("LA", "La"):
        grey, alpha = image.convert("LA").split()
        return grey, alpha
    if mode == "RGB":
        return image, _keyed(image, raw, _exact(image, raw, data))
    if mode in ("CMYK", "LAB"):
        return image, None
    if mode in ("RGBA", "RGBa", "PA") or (mode == "P" and image.has_transparency_data):
        *colours, alpha = image.convert("RGBA").split()
        padding = image.format in _PADDED and alpha.getextrema() == (0, 0)
        return Image.merge("RGB", colours), None if padding else alpha
    if mode in ("P", "RGBX", "YCbCr", "HSV"):
        return image.convert("RGB"), None
    raise BadPicture("undecodable", f"{image.format} in mode {mode}: no agreed meaning")


def _grey(image: Image.Image, raw: str) -> tuple[Image.Image, Image.Image | None]:
    """Deep grey, by the range of its type: its eight highest bits, or 0 to 1 of floats."""
    _refuse_signed(image)
    levels = np.asarray(image)
    if image.mode == "F":
        # A NaN compares as false.
        if not ((levels >= -_SLACK) & (levels <= 1 + _SLACK)).all():
            raise BadPicture(
                "undecodable", "floating-point grey outside of 0 to 1: no agreed range"
            )
        shown = (levels.clip(0, 1) * 255).round()
    elif image.mode == "I" and image.format == "TIFF":  # unsigned, which Pillow holds as signed
        shown = levels.astype(np.int32).view(np.uint32) >> 24
    elif image.mode == "I":  # 32 bits that hold 16
        shown = levels.clip(0, 65535) >> 8
    else:
        bits = _tag(image, _BITS)
        shown = levels >> ((bits[0] if bits else 16) - 8)
    if _tag(image, _PHOTOMETRIC) == (_WHITE_IS_ZERO,):
        shown = 255 - shown
    alpha = _keyed(image, raw, levels[..., None])
    return Image.fromarray(shown.astype(np.uint8)), alpha


def _refuse_signed(image: Image.Image) -> None:
    if _SIGNED in _tag(image, _SAMPLE_FORMAT):
        raise BadPicture("undecodable", "signed samples: no agreed range")


def _deep_planes(image: Image.Image) -> bool:
    """Whether it is a plain TIFF of 16 bits whose colours lie one behind the other, of which Pillow
    takes every byte for a sample."""
    tile: Any = getattr(image, "tile", None)
    deep = _tag(image, _PLANES) == (_SEPARATE,) and set(_tag(image, _BITS)) == {16}
    return bool(deep and tile and tile[0].codec_name == "raw")


def _read_whole_samples(image: Any) -> None:
    order = ";16B" if image.tag_v2.prefix == b"MM" else ";16L"
    image.tile = [
        part._replace(args=(part.args[0] + order, *part.args[1:]))
        for part in image.tile
        if isinstance(part.args, tuple)
    ]


def _refuse_wrapped(image: Image.Image, data: bytes | None) -> None:
    """Pillow rounds the deep samples of a JPEG 2000 in colours so that its lightest become 0."""
    if image.format != "JPEG2000" or data is None or image.mode.startswith("I"):
        return
    at = data.find(_SIZ)
    count = int.from_bytes(data[at + 40 : at + 42], "big") if at >= 0 else 0
    bits = max(((depth & 0x7F) + 1 for depth in data[at + 42 : at + 42 + 3 * count : 3]), default=8)
    if bits > 8 and any(low == 0 for low, _ in (band.getextrema() for band in image.split())):
        raise BadPicture(
            "undecodable", f"JPEG 2000 of {bits} bits, whose black and white come out alike"
        )


def _tag(image: Image.Image, number: int) -> tuple[Any, ...]:
    """A TIFF tag's values; () where there are none."""
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    value = tags.get(number, ())
    return value if isinstance(value, tuple) else (value,)


def _raw_mode(image: Image.Image) -> str:
    """How samples lie in the file, e.g. "RGB;16B"; "" once the pixels are loaded."""
    tile: Any = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    return args if isinstance(args, str) else ""


def _deep_key(image: Image.Image, raw: str) -> Any:
    """The transparent colour of a PNG whose samples have not 8 bits, or None."""
    key = image.info.get("transparency")
    odd = raw == "RGB;16B" or image.mode.startswith("I;16") or raw in ("L;2", "L;4", "1")
    return key if odd and image.format == "PNG" else None


def _keyed(image: Image.Image, raw: str, samples: np.ndarray) -> Image.Image | None:
    """Opacity, where one colour of a picture without an alpha channel is transparent.

    Args:
        samples: (H, W, C), as deep as `transparency` is.
    """
    key = image.info.get("transparency")
    if key is None or isinstance(key, bytes):
        return None
    scale = {"1": 255, "L;2": 85, "L;4": 17}.get(raw, 1)  # Pillow spreads grey over 0 to 255
    wanted = np.atleast_1d(np.asarray(key)) * scale
    clear = (samples == wanted).all(-1)
    return Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)) if clear.any() else None


def _exact(image: Image.Image, raw: str, data: bytes | None) -> np.ndarray:
    """(H, W, 3) samples; of a 16-bit PNG with a transparent colour all 16 bits.

    Pillow keeps the high bytes. Read as if the file were little-endian, it keeps the low ones.
    """
    high = np.asarray(image)
    if raw != "RGB;16B" or "transparency" not in image.info or data is None:
        return high
    again: Any = Image.open(io.BytesIO(data), formats=["PNG"])
    name, box, offset, _ = again.tile[0]
    again.tile = [(name, box, offset, "RGB;16L")]
    again.load()
    return high.astype(np.uint16) << 8 | np.asarray(again)

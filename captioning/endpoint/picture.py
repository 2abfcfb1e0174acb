"""A picture as a data URL: its own bytes wherever a server can be trusted to read them."""

from __future__ import annotations

import base64
import io

from PIL import ExifTags, Image

from captioning.captioner import Picture

MAX_SIDE = 2048  # pixels; larger ones are reduced first: no model looks at more of them
MAX_BYTES = 4_000_000  # of a file that is sent as it is
QUALITY = 95  # of a JPEG that is sent in place of the file
#: Pillow's format -> its media type, the modes every server turns into RGB alike, and how a whole
#: file ends.
_KNOWN: dict[str | None, tuple[bytes, tuple[str, ...], bytes]] = {
    "JPEG": (b"image/jpeg", ("RGB", "L"), b"\xff\xd9"),
    "PNG": (b"image/png", ("RGB", "L", "P", "1"), b"IEND\xaeB`\x82"),
    "WEBP": (b"image/webp", ("RGB",), b""),
}


def data_url(picture: Picture) -> bytes:
    """ "data:image/jpeg;base64,…", upright and without transparency.

    A file is sent as it is where its header says that nothing is to be done to it; no pixel is
    decoded. Any other picture is opened and sent as a JPEG.

    Raises:
        BadPicture: it had to be opened and cannot be.
    """
    return as_it_is(picture.data) or encoded(picture.open())


def as_it_is(data: bytes | None) -> bytes | None:
    """The data URL of a file's own bytes, or None: it has to be opened."""
    kind = None if data is None or len(data) > MAX_BYTES else _kind(data)
    return None if kind is None or data is None else _url(kind, data)


def encoded(image: Image.Image) -> bytes:
    """The data URL of an RGB picture as a JPEG, its longer side at most MAX_SIDE."""
    if max(image.size) > MAX_SIDE:
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return _url(b"image/jpeg", file.getvalue())


def _url(kind: bytes, data: bytes) -> bytes:
    return b"data:%b;base64,%b" % (kind, base64.b64encode(data))


def _kind(data: bytes) -> bytes | None:
    """The media type of a file that can be sent as it is."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        kind, modes, end = _KNOWN[image.format]
        fits = (
            image.mode in modes
            and not image.has_transparency_data
            and 0 < min(image.size) <= max(image.size) <= MAX_SIDE
            and not getattr(image, "is_animated", False)
            and _whole(data, end)
            and _upright(image, data)
        )
    except Exception:  # whoever opens it says what is wrong with it
        return None
    return kind if fits else None


def _whole(data: bytes, end: bytes) -> bool:
    if data[:4] == b"RIFF":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    return data.rstrip(b"\0").endswith(end)


def _upright(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":
        # Pillow decodes a PNG to look for EXIF behind its pixels.
        return b"eXIf" not in data and b"tiff:Orientation" not in data
    return image.getexif().get(ExifTags.Base.Orientation, 1) == 1

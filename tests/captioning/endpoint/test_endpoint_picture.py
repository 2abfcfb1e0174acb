from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from captioning.captioner import BadPicture, Picture
from captioning.endpoint.picture import MAX_BYTES, MAX_SIDE, as_it_is, data_url, encoded

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE)  # 64 wide, 48 high
GLASS = PHOTO.copy()
GLASS.putalpha(128)


def file(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return file(PHOTO, kind, exif=exif)


def xmp() -> bytes:
    info = PngImagePlugin.PngInfo()
    text = '<rdf:Description tiff:Orientation="6"/>'
    info.add_itxt("XML:com.adobe.xmp", text)
    return file(PHOTO, "PNG", pnginfo=info)


def bomb() -> bytes:
    """A PNG whose header says 20,000 x 20,000."""
    data = file(Image.new("L", (1, 1)), "PNG")
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def decoded(url: bytes) -> tuple[bytes, bytes]:
    head, _, data = url.partition(b";base64,")
    return head.removeprefix(b"data:"), base64.b64decode(data, validate=True)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (file(PHOTO, "JPEG"), b"image/jpeg"),
        (file(PHOTO, "JPEG", progressive=True), b"image/jpeg"),
        (file(PHOTO.convert("L"), "JPEG"), b"image/jpeg"),
        (file(PHOTO, "PNG"), b"image/png"),
        (file(PHOTO.convert("P"), "PNG"), b"image/png"),
        (file(PHOTO, "WEBP"), b"image/webp"),
        (file(PHOTO, "WEBP", lossless=True), b"image/webp"),
        (file(Image.new("RGB", (1, 1)), "PNG"), b"image/png"),
    ],
)
def test_a_file_that_needs_nothing_is_sent_byte_for_byte(data, kind):
    url = as_it_is(data)
    assert url is not None
    assert decoded(url) == (kind, data)


@pytest.mark.parametrize(
    "data",
    [
        None,
        b"",
        b"no picture",
        turned("JPEG"),
        turned("PNG"),
        turned("WEBP"),
        xmp(),
        file(PHOTO.convert("CMYK"), "JPEG"),
        file(GLASS, "PNG"),
        file(PHOTO.convert("L"), "PNG", transparency=3),
        file(GLASS, "WEBP"),
        file(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "PNG"),
        file(PHOTO, "GIF"),
        file(PHOTO, "BMP"),
        file(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(180)]),
        file(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(180)]),
        file(Image.new("RGB", (MAX_SIDE + 1, 1)), "PNG"),
        bomb(),
        file(PHOTO, "PNG") + b" " * MAX_BYTES,
        file(PHOTO, "JPEG")[:-40],
        file(PHOTO, "PNG")[:-40],
        file(PHOTO, "WEBP")[:-40],
        file(PHOTO, "WEBP", lossless=True)[:-40],
    ],
)  # fmt: skip
def test_any_other_has_to_be_opened(data):
    assert as_it_is(data) is None


def test_what_is_opened_is_sent_as_a_jpeg_that_looks_the_same():
    smooth = Image.linear_gradient("L").convert("RGB")
    url = data_url(Picture("a", lambda: smooth, None))
    kind, data = decoded(url)
    assert kind == b"image/jpeg"
    sent = np.asarray(Image.open(io.BytesIO(data)), dtype=int)
    assert abs(sent - np.asarray(smooth, dtype=int)).max() <= 4


def test_a_large_picture_is_reduced_and_the_caller_keeps_his_own():
    large = Image.new("RGB", (2 * MAX_SIDE, MAX_SIDE))
    _, data = decoded(encoded(large))
    assert Image.open(io.BytesIO(data)).size == (MAX_SIDE, MAX_SIDE // 2)
    assert large.size == (2 * MAX_SIDE, MAX_SIDE)


def test_a_bad_picture_says_so_when_it_is_opened():
    def bad() -> Image.Image:
        raise BadPicture("undecodable", "no picture")

    with pytest.raises(BadPicture, match="no picture"):
        data_url(Picture("a", bad, b"no picture"))

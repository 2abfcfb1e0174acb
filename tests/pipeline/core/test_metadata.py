"""What a kept picture says beside its pixels: nothing, but how it is turned and its colours."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from pipeline.core import metadata
from pipeline.core.images import BadPicture, orientation, read_pixels
from pipeline.core.rules import Rules, keep, stripped
from pipeline.core.samples import ImageRef, ImageSample, RawImage
from tests.pipeline.core.test_images import blobs, encoded
from tests.pipeline.helpers import profiles

SECRET = b"52 deg 31 min north, Anna's camera"
PICTURE = blobs(48, 32)


def exif(turn: int | None) -> Image.Exif:
    found = Image.Exif()
    if turn is not None:
        found[0x0112] = turn
    found[0x010F] = SECRET.decode()  # the camera's maker
    found.get_ifd(0x8825)[1] = "N"  # GPS
    found.get_ifd(0x8825)[2] = (52.0, 31.0, 12.5)
    return found


XMP = b'<x:xmpmeta><rdf:Description exif:GPSLatitude="52" dc:creator="%b"/></x:xmpmeta>' % SECRET


def jpeg(turn: int | None = None, **options) -> bytes:
    given = {"exif": exif(turn), "xmp": XMP, "comment": SECRET, **options}
    data = encoded(PICTURE, "JPEG", **given)
    iptc = b"\xff\xed" + struct.pack(">H", 2 + 14 + len(SECRET)) + b"Photoshop 3.0\0" + SECRET
    maker = b"\xff\xe9" + struct.pack(">H", 2 + len(SECRET)) + SECRET
    return data[:20] + iptc + maker + data[20:]


def png(turn: int | None = None, **options) -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Author", SECRET.decode())
    texts.add_text("Comment", SECRET.decode(), zip=True)
    texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
    texts.add(b"tIME", bytes([7, 230, 1, 2, 3, 4, 5]))
    texts.add(b"prVt", SECRET)
    return encoded(PICTURE, "PNG", pnginfo=texts, exif=exif(turn), **options)


def webp(turn: int | None = None, **options) -> bytes:
    return encoded(PICTURE, "WEBP", lossless=True, exif=exif(turn), xmp=XMP, **options)


def mpo(turn: int | None = None, **options) -> bytes:
    given = {"exif": exif(turn), **options}
    first, second = blobs(48, 32), blobs(32, 48)
    second.encoderinfo = {"exif": exif(None)}
    return encoded(first, "MPO", save_all=True, append_images=[second], **given)


MAKERS = {"jpeg": jpeg, "png": png, "webp": webp, "mpo": mpo}


def leaks(data: bytes) -> bool:
    """Whether what was to go is still there; packed text is told by its chunk's name."""
    words = (SECRET, b"GPS", b"xmpmeta", b"Photoshop", b"zTXt", b"iTXt", b"MPF\0")
    return any(word in data for word in words)


@pytest.mark.parametrize("turn", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("name", MAKERS)
def test_all_goes_but_orientation_and_colours(name, turn):
    data = MAKERS[name](turn, icc_profile=profiles.rgb())
    assert leaks(data)
    plain = stripped(data)
    assert plain is not None
    assert not leaks(plain)
    assert len(plain) < len(data)
    found = Image.open(io.BytesIO(plain))
    assert found.info["icc_profile"] == profiles.rgb()
    assert dict(found.getexif()) == ({0x0112: turn} if turn not in (None, 1) else {})
    np.testing.assert_array_equal(read_pixels(plain), read_pixels(data))
    np.testing.assert_array_equal(  # the coded pixels are the same bytes, not coded anew
        np.asarray(found), np.asarray(Image.open(io.BytesIO(data)))
    )
    assert stripped(plain) == plain


def test_a_jpeg_loses_what_lies_behind_it_and_its_thumbnails():
    data = encoded(PICTURE, "JPEG")
    assert metadata.without(data) == data
    assert metadata.without(data + b"\xff\xd8\xff\xe1 a film " + SECRET) == data
    thumb = data[:4] + struct.pack(">H", 16 + 3) + data[6:18] + b"\1\1abc" + data[20:]
    assert read_pixels(thumb).shape == (32, 48, 3)
    assert metadata.without(thumb) == data
    jfxx = data[:20] + b"\xff\xe0\0\x0aJFXX\0\x10\0\0" + data[20:]
    assert metadata.without(jfxx) == data


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"restart_marker_rows": 1}, {"quality": 5}]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_other_jpegs_stay_what_they_are(mode, options):
    """An Adobe marker says which colours four components are."""
    data = encoded(PICTURE.convert(mode), "JPEG", **options)
    assert metadata.without(data) == data
    noted = encoded(PICTURE.convert(mode), "JPEG", comment=SECRET, exif=exif(None), **options)
    assert stripped(noted) == data


def test_orientation_in_xmp_alone():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(PICTURE, "JPEG", xmp=xmp)
    plain = stripped(data)
    assert plain is not None
    assert b"xmpmeta" not in plain
    assert read_pixels(plain).shape == read_pixels(data).shape == (48, 32, 3)


def test_a_picture_without_metadata_is_not_touched(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(PICTURE, kind)
        assert stripped(data) is data or stripped(data) == data


def test_rules_strip_or_keep():
    data = jpeg(6)
    raw = RawImage(ImageRef("0", "x:", "a picture"), data)
    found = keep(raw, Rules(min_image_size=0))
    assert isinstance(found, ImageSample)
    assert not leaks(found.data)
    assert (found.width, found.height, found.extension) == (32, 48, "jpg")
    whole = keep(raw, Rules(min_image_size=0, metadata="keep"))
    assert isinstance(whole, ImageSample)
    assert whole.data == data


def test_one_too_odd_to_walk_is_kept_as_its_pixels():
    data = jpeg()
    odd = data[:20] + b"\0" + data[20:]  # between two segments: libjpeg skips it
    assert metadata.without(odd) is None
    found = keep(RawImage(ImageRef("0", "x:", "a picture"), odd), Rules(min_image_size=0))
    assert isinstance(found, ImageSample)
    assert found.extension == "png"
    assert not leaks(found.data)
    np.testing.assert_array_equal(read_pixels(found.data), read_pixels(odd))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([make(6) for make in MAKERS.values()]), st.data())
def test_damaged_files_keep_their_pixels_or_are_refused(data, draw):
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        damaged[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    damaged = bytes(damaged[: draw.draw(st.integers(len(data) // 2, len(data)))])
    try:
        before, plain = read_pixels(damaged), stripped(damaged)
    except BadPicture:
        return
    if plain is not None:
        np.testing.assert_array_equal(read_pixels(plain), before)
        assert orientation(plain) == orientation(damaged)


def test_png_text_that_cannot_be_unpacked_is_no_reason_to_refuse():
    body = b"zTXtComment\0\0" + zlib.compress(bytes(80 << 20))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    plain = encoded(PICTURE, "PNG")
    data = plain[:33] + chunk + plain[33:]
    np.testing.assert_array_equal(read_pixels(data), np.asarray(PICTURE))
    assert stripped(data) == plain

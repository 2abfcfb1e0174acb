"""Colour profiles and the modes and depths of pictures: numbers are read by their meaning."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from captioning import load
from pipeline.core import colour, images, modes
from pipeline.core.images import BadPicture, read, read_pixels
from pipeline.core.rules import Rules, keep
from pipeline.core.samples import ImageRef, ImageSample, RawImage
from tests.pipeline.core.test_images import blobs, encoded, png_of
from tests.pipeline.helpers import profiles

P3 = profiles.rgb()
SMALL = blobs(48, 32)
LEVELS = np.asarray(SMALL)
GREY = np.asarray(SMALL.convert("L"))


def shown(data: bytes) -> np.ndarray:
    return read_pixels(data).astype(int)


# Profiles.


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_a_phones_colours_become_srgb(kind):
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    dull = Image.fromarray((70 + LEVELS * 0.4).astype(np.uint8))  # inside of sRGB
    options |= {"HEIF": {"quality": -1, "chroma": 444}, "AVIF": {"quality": 100}}
    images._formats()  # registers HEIF
    data = encoded(dull, kind, icc_profile=P3, **options.get(kind, {}))
    plain = encoded(dull, kind, **options.get(kind, {}))
    wanted = profiles.p3_as_srgb(shown(plain))
    assert abs(wanted - shown(plain)).max() > 8
    assert abs(shown(data) - wanted).max() <= 2
    assert read(data).profile == colour.CONVERTED
    assert read(plain).profile == ""


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_fast_path_and_pillows_convert_alike(monkeypatch, mode, orientation):
    profile = P3 if mode == "RGB" else profiles.grey(1.8)
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(SMALL.convert(mode), "JPEG", icc_profile=profile, exif=exif)
    fast = read(data)
    monkeypatch.setattr(images, "_jpeg", lambda data, image: None)
    np.testing.assert_array_equal(read(data).pixels, fast.pixels)
    assert read(data).profile == fast.profile == colour.CONVERTED


def test_grey_by_its_curve():
    data = encoded(SMALL.convert("L"), "PNG", icc_profile=profiles.grey(1.8))
    wanted = 255 * profiles.from_linear((GREY / 255) ** 1.8)
    assert abs(shown(data) - wanted[..., None]).max() <= 1
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert abs(shown(encoded(deep, "PNG", icc_profile=profiles.grey(1.8))) - shown(data)).max() <= 1
    # Grey with a profile for RGB: its curve counts.
    adobe = encoded(SMALL.convert("L"), "JPEG", icc_profile=profiles.rgb(profiles.ADOBE, 1.8))
    assert read(adobe).profile == colour.CONVERTED


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_ink_by_its_press(kind):
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    data = encoded(ink, kind, icc_profile=profiles.press())
    red, green, blue = shown(data).mean((0, 1))
    assert read(data).profile == colour.CONVERTED
    assert 60 < red < green < blue < 230  # not Pillow's pure cyan
    assert (shown(encoded(ink, kind)).mean((0, 1)) < [10, 256, 256]).all()


def test_transparency_stays_with_a_profile():
    clear = Image.merge("RGBA", [*SMALL.split(), Image.new("L", SMALL.size, 0)])
    half = Image.fromarray(
        np.where(np.arange(48) < 24, 255, 0).astype(np.uint8)[None].repeat(32, 0)
    )
    clear.putalpha(half)
    data = encoded(clear, "PNG", icc_profile=P3)
    assert (shown(data)[:, 24:] == 255).all()
    np.testing.assert_array_equal(
        shown(data)[:, :24], shown(encoded(SMALL, "PNG", icc_profile=P3))[:, :24]
    )


def srgbs() -> dict[str, bytes]:
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {"LittleCMS's": made, "a table's": profiles.rgb(profiles.SRGB)}


@pytest.mark.parametrize(("name", "profile"), srgbs().items())
def test_srgb_costs_nothing(name, profile, monkeypatch):
    data = encoded(SMALL, "JPEG", icc_profile=profile)
    read(data)
    monkeypatch.setattr(ImageCms, "applyTransform", lambda *_: pytest.fail("converted"))
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *_: pytest.fail("built again"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("Pillow decodes"))
    np.testing.assert_array_equal(read(data).pixels, read(encoded(SMALL, "JPEG")).pixels)
    assert read(data).profile == ""


def test_a_transform_is_made_once(monkeypatch):
    data = encoded(SMALL, "JPEG", icc_profile=P3)
    read(data)
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *_: pytest.fail("built again"))
    assert read(data).profile == colour.CONVERTED


def dark() -> bytes:
    """Colorants of nothing: all comes out black."""
    return profiles.rgb(((0.0, 0.0, 0.0),) * 3)


@pytest.mark.parametrize(
    "profile",
    [b"x", bytes(range(256)) * 9, P3[:300], profiles.press(), profiles.grey(2.2), dark()],
)
def test_broken_profiles_and_others_kinds_are_ignored_and_counted(profile):
    data = encoded(SMALL, "JPEG", icc_profile=profile)
    found = read(data)
    np.testing.assert_array_equal(found.pixels, read_pixels(encoded(SMALL, "JPEG")))
    assert found.profile == colour.IGNORED


def test_huge_profiles_are_ignored():
    huge = encoded(SMALL, "JPEG", icc_profile=P3 + bytes(colour.MAX_BYTES))
    assert read(huge).profile == colour.IGNORED
    packed = encoded(SMALL, "PNG", icc_profile=P3 + bytes(64 << 20))  # Pillow refuses to unpack it
    assert read(packed).profile == colour.IGNORED
    np.testing.assert_array_equal(read_pixels(packed), LEVELS)


def kept(data: bytes, **rules) -> ImageSample:
    rules = Rules(min_image_size=0, **rules)
    found = keep(RawImage(ImageRef("0", "x:", "a picture"), data), rules)
    assert isinstance(found, ImageSample), found
    return found


def test_what_is_stored_says_its_colours_or_is_srgb():
    data = encoded(SMALL, "JPEG", icc_profile=P3, quality=95)
    same = kept(data)
    assert same.data == data
    assert same.profile == colour.CONVERTED
    shrunk = kept(data, image_size=16)
    wanted = images.resize(read_pixels(data), 16, 24).astype(int)
    assert abs(shown(shrunk.data) - wanted).mean() < 6
    assert "icc_profile" not in Image.open(io.BytesIO(shrunk.data)).info
    np.testing.assert_array_equal(
        read_pixels(kept(encoded(SMALL, "TIFF", icc_profile=P3)).data),
        read_pixels(encoded(SMALL, "TIFF", icc_profile=P3)),
    )


@pytest.mark.parametrize("profile", [P3, None])
def test_captioners_alone_see_the_same_pixels(profile):
    picture = Image.open(io.BytesIO(encoded(SMALL, "PNG", icc_profile=profile)))
    assert (shown(encoded(SMALL, "PNG", icc_profile=profile)) == images.upright(picture)).all()
    deep = Image.fromarray(np.full((9, 9), 60_000, np.uint16))
    assert "white" in load("colour")([deep])[0].text or "grey" in load("colour")([deep])[0].text


# Modes and depths.


def tiff(samples: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1) -> bytes:
    """An uncompressed TIFF of one strip; `samples` as they lie in the file."""
    height, width = samples.shape[:2]
    body = samples.tobytes()
    count = samples.shape[2] if samples.ndim == 3 else 1
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 1)]
    tags += [(262, 3, 1, photometric), (273, 4, 1, 0), (277, 3, 1, count)]
    tags += [(278, 4, 1, height), (279, 4, 1, len(body)), (339, 3, 1, sample_format)]
    at = 8 + 2 + 12 * len(tags) + 4
    tags = [(t, k, n, at if t == 273 else v) for t, k, n, v in tags]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + body


def twelve_bits(levels: np.ndarray) -> np.ndarray:
    """Two samples of 12 bits in three bytes."""
    a, b = levels[:, ::2], levels[:, 1::2]
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1)
    return packed.astype(np.uint8).reshape(len(levels), -1, 3)


def twelve_bit_tiff() -> bytes:
    data = bytearray(tiff(twelve_bits(GREY.astype(int) * 16 + 7), 12))
    packed = struct.pack("<HHII", 256, 4, 1, 24)
    at = bytes(data).index(packed)
    data[at : at + 12] = struct.pack("<HHII", 256, 4, 1, 48)
    at = bytes(data).index(struct.pack("<HHII", 277, 3, 1, 3))
    data[at : at + 12] = struct.pack("<HHII", 277, 3, 1, 1)
    return bytes(data)


def bmp32(alpha: int) -> bytes:
    """With a mask for alpha, as screenshot tools write it."""
    rows = np.concatenate([LEVELS[::-1, :, ::-1], np.full((32, 48, 1), alpha, np.uint8)], -1)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 108, 48, 32, 1, 32, 3, rows.size, 0, 0, 0, 0) + masks
    head = head.ljust(108, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + 108 + rows.size, 0, 0, 122) + head + rows.tobytes()


def keyed_png(samples: np.ndarray, bits: int, key: tuple[int, ...]) -> bytes:
    """A PNG of grey or RGB samples with one transparent colour."""
    big = samples.astype(">u2") if bits == 16 else samples.astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in big)
    plain = png_of(48, 32, (bits, 2 if samples.ndim == 3 else 0), zlib.compress(rows))
    body = b"tRNS" + struct.pack(f">{len(key)}H", *key)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    at = plain.index(b"IDAT") - 4
    return plain[:at] + chunk + plain[at:]


def planar_tiff(order: str) -> bytes:
    """16 bits a sample: all reds, then all greens, then all blues, in one strip each."""
    planes = [LEVELS[..., n].astype(f"{order}u2") * 257 for n in range(3)]
    size, at = planes[0].nbytes, 8 + 2 + 12 * 10 + 4
    more = struct.pack(
        order + "3H6I", 16, 16, 16, *(at + 30 + n * size for n in range(3)), *[size] * 3
    )
    tags = [(256, 4, 1, 48), (257, 4, 1, 32), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 3, at + 6), (277, 3, 1, 3), (278, 4, 1, 32), (279, 4, 3, at + 18)]
    tags += [(284, 3, 1, 2)]
    entries = b"".join(
        struct.pack(order + ("HHIHxx" if k == 3 and n == 1 else "HHII"), t, k, n, v)
        for t, k, n, v in tags
    )
    head = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    body = b"".join(plane.astype(f"{order}u2").tobytes() for plane in planes)
    return head + struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0" + more + body


DEEP = LEVELS.astype(np.uint16) * 256
DEEP[0, 0] = (40 * 256 + 1, 50 * 256 + 2, 60 * 256 + 3)
DEEP[0, 1] = (40 * 256 + 1, 50 * 256 + 2, 60 * 256 + 4)  # the same but for a low byte
CLEAR = DEEP[0, 0]
GREY3 = GREY[..., None].repeat(3, -1).astype(int)


def with_white(levels: np.ndarray, where: tuple) -> np.ndarray:
    changed = levels.astype(int).copy()
    changed[where] = 255
    return changed


#: name -> (bytes, what they show)
MEANT = {
    "bmp without opacity": (bmp32(0), LEVELS),
    "bmp opaque": (bmp32(255), LEVELS),
    "tiff 32 bit": (tiff(GREY.astype("<u4") << 24, 32), GREY3),
    "tiff float": (tiff((GREY / 255).astype("<f4"), 32, 3), GREY3),
    "tiff float, white is 0": (tiff((GREY / 255).astype("<f4"), 32, 3, 0), 255 - GREY3),
    "tiff 16 bit, white is 0": (tiff(GREY.astype("<u2") << 8, 16, 1, 0), 255 - GREY3),
    "tiff 16 bit, a plane for each colour": (planar_tiff("<"), LEVELS),
    "tiff 16 bit, planes, big-endian": (planar_tiff(">"), LEVELS),
    "tiff 12 bit": (twelve_bit_tiff(), GREY3),
    "tiff 8 bit, white is 0": (tiff(GREY, 8, 1, 0), 255 - GREY3),
    "pgm 16 bit": (b"P5 48 32 65535\n" + (GREY.astype(int) * 257).astype(">u2").tobytes(), GREY3),
    "pgm 10 bit": (b"P5 48 32 1020\n" + (GREY.astype(int) * 4).astype(">u2").tobytes(), GREY3),
    "pfm": (b"Pf\n48 32\n-1.0\n" + (GREY[::-1] / 255).astype("<f4").tobytes(), GREY3),
    "jpeg 2000, 16 bit": (encoded(Image.fromarray(GREY.astype("<u2") << 8), "JPEG2000"), GREY3),
    "png 16 bit, one clear": (
        keyed_png(DEEP, 16, tuple(CLEAR)),
        with_white(DEEP >> 8, (0, 0)),
    ),
    "png 16 bit grey, one clear": (
        keyed_png(GREY.astype(int) * 256, 16, (int(GREY[3, 3]) * 256,)),
        with_white(GREY3, GREY[3, 3] == GREY),
    ),
    "png 16 bit grey, none clear": (
        keyed_png(GREY.astype(int) * 256, 16, (int(GREY[3, 3]) * 256 + 1,)),
        GREY3,
    ),
    "png 8 bit rgb, one clear": (
        keyed_png(LEVELS, 8, tuple(map(int, LEVELS[5, 5]))),
        with_white(LEVELS, (LEVELS[5, 5] == LEVELS).all(-1)),
    ),
}


@pytest.mark.parametrize("name", MEANT)
def test_each_depth_by_its_meaning(name):
    data, wanted = MEANT[name]
    assert abs(shown(data) - wanted).max() <= 1
    assert (np.asarray(images.decode(data)) == shown(data)).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_shallow_grey_with_a_clear_level(bits):
    top = 2**bits - 1
    values = np.arange(16 * 8).reshape(8, 16) % (top + 1)
    packed = np.packbits(
        np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., -bits:].reshape(8, -1),
        axis=1,
    )
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    plain = png_of(16, 8, (bits, 0), body)
    key = b"tRNS" + struct.pack(">H", top - 1)
    chunk = struct.pack(">I", 2) + key + struct.pack(">I", zlib.crc32(key))
    at = plain.index(b"IDAT") - 4
    found = shown(plain[:at] + chunk + plain[at:])[..., 0]
    wanted = np.where(values == top - 1, 255, values * 255 // top)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "data",
    [
        tiff((GREY.astype("<f4")), 32, 3),  # 0 to 255 in floats
        tiff(np.full((4, 4), np.nan, "<f4"), 32, 3),
        tiff(GREY.astype("<i4"), 32, 2),
        tiff(GREY.astype("<i2"), 16, 2),
        tiff(GREY.astype("i1"), 8, 2),
        b"Pf\n48 32\n-1.0\n" + GREY.astype("<f4").tobytes(),
    ],
)
def test_numbers_without_an_agreed_meaning_are_refused(data):
    with pytest.raises(BadPicture, match="no agreed range") as error:
        read_pixels(data)
    assert error.value.reason == "undecodable"


#: 8 by 8 pixels of one colour with 16 bits a sample, by OpenJPEG; Pillow writes no such files.
DEEP_JPEG_2000 = {
    200: (
        "/0//UQAvAAAAAAAIAAAACAAAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAADDwEBDwEBDwEB/1IADQECAAEBAAQE"
        "AAGI/1wABECA/5AACgAAAAAAoAAB/5PD/hUAEVBUo2r9SAAAADCQl3XrAAwkJeCTYAAYSEaoUMJCXho6AAGE"
        "hGqFDCQl3/C8EVBUooNWKAAAADCQizCBhISEBoBhIS8I3AAAwkI1QoYSEhAaAYSEvCNwAAMJCNXf8LwRUFSi"
        "g1YoAAAAMJCLMIGEhIQGgGEhLwjcAADCQjVChhISEBoBhIS8I3AAAwkI1f/Z"
    ),
    255: (
        "/0//UQAvAAAAAAAIAAAACAAAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAADDwEBDwEBDwEB/1IADQECAAEBAAQE"
        "AAGI/1wABECA/5AACgAAAAAAggAB/5PB/A0AFABcon22kAADCQl/Ru4AAABhIRiBIwkJeGjf8KARUFSvgj1I"
        "AAGEhGqFDCQkIDQDCQj3DBhIS/pViAAAAwkIxAkYSEhA3/CgEVBUr4I9SAABhIRqhQwkJCA0AwkI9wwYSEv6"
        "VYgAAAMJCMQJGEhIQP/Z"
    ),
}


def test_a_deep_jpeg_2000_whose_white_came_out_black_is_refused():
    found = shown(base64.b64decode(DEEP_JPEG_2000[200]))
    assert abs(found - [20, 200, 20]).max() <= 1
    with pytest.raises(BadPicture, match="16 bits, whose black and white come out alike"):
        read_pixels(base64.b64decode(DEEP_JPEG_2000[255]))


def test_lab():
    lab = ImageCms.profileToProfile(
        SMALL, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    assert abs(shown(encoded(lab, "TIFF")) - LEVELS).mean() < 4


def test_heic(monkeypatch):
    """The file says how it is turned, and what EXIF says of it is not done once more."""
    images._formats()
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(SMALL, "HEIF", quality=95, chroma=444, exif=exif.tobytes())
    found = kept(data)
    assert (found.extension, found.width, found.height) == ("png", 32, 48)
    turned = np.asarray(SMALL.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert abs(shown(found.data) - turned).mean() < 6
    assert images.read_header(data)[:3] == ("HEIF", 32, 48)
    for tenths in range(10):
        with pytest.raises(BadPicture):
            read_pixels(data[: len(data) * tenths // 10])
    without = tuple(name for name in images._formats() if name != "HEIF")
    monkeypatch.setattr(images, "_formats", lambda: without)
    with pytest.raises(BadPicture, match=r"pip install 'microdit\[phones\]'") as error:
        read_pixels(data)
    assert error.value.reason == "undecodable"


def test_different_pictures_are_no_longer_each_others_duplicates():
    one, two = (kept(tiff((GREY * share / 255).astype("<f4"), 32, 3)) for share in (1, 0.5))
    assert one.sha256 != two.sha256


# What the first version misread, for the shards that it made.


def test_what_was_misread_is_told_by_the_header(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", lambda *_: pytest.fail("decoded"))
    misread = [encoded(SMALL, kind, icc_profile=P3) for kind in ("JPEG", "WEBP")]
    misread += [keyed_png(DEEP, 16, (1, 2, 3)), MEANT["png 16 bit grey, one clear"][0]]
    assert all(map(images.once_misread, misread))
    well = [encoded(SMALL, "JPEG"), encoded(SMALL, "JPEG", icc_profile=srgbs()["a table's"])]
    well += [b"no picture", MEANT["png 8 bit rgb, one clear"][0]]
    assert not any(map(images.once_misread, well))
    assert modes.base_mode(Image.new("I;16", (1, 1))) == "L"

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from pipeline.core import images
from pipeline.core.images import MAX_PIXELS, BadPicture, decode, fit, read_header, read_pixels

LSB = 2  # of 255: what a resized picture may differ from Pillow's


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def blobs(width: int, height: int) -> Image.Image:
    """Smooth colours with edges, no symmetry: every turn of it is another picture."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y - x), np.sign(np.sin(20 * x * y + x))]
    return Image.fromarray((127.5 + 110 * np.stack(waves, -1)).astype(np.uint8))


def reason(data: bytes) -> str:
    """Why every reader refuses it."""
    with pytest.raises(BadPicture) as pixels:
        read_pixels(data)
    with pytest.raises(BadPicture) as picture:
        decode(data)
    assert picture.value.reason == pixels.value.reason
    return pixels.value.reason


def pixels_or_reason(data: bytes) -> np.ndarray | str:
    """The only two things that bytes may come to."""
    try:
        return read_pixels(data)
    except BadPicture as error:
        return error.reason


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# Formats.

RGB = blobs(37, 23)
MASK = Image.fromarray(np.where(np.arange(37) < 20, 255, 0).astype(np.uint8)[None].repeat(23, 0))
RGBA = Image.merge("RGBA", [*RGB.split(), MASK])
WHITE = Image.composite(RGB, Image.new("RGB", RGB.size, "white"), MASK)
GREY = RGB.convert("L")
PALETTE = RGB.quantize(16)
CMYK = RGB.convert("CMYK")
SECOND = blobs(37, 23).transpose(Image.Transpose.ROTATE_180)


def sixteen(image: Image.Image) -> Image.Image:
    """16-bit grey whose low byte is not zero."""
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 256 + 200)


def clear_in(image: Image.Image, index: int) -> Image.Image:
    """The palette picture as RGB, with white for one index."""
    pixels = np.array(image.convert("RGB"))
    pixels[np.asarray(image) == index] = 255
    return Image.fromarray(pixels)


def rgb16_png() -> bytes:
    """Pillow cannot write 16-bit RGB."""
    rows = (np.asarray(RGB).astype(np.uint16) * 256 + 77).astype(">u2")
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    return png_of(*RGB.size, (16, 2), zlib.compress(body))


def png_of(width: int, height: int, kind: tuple[int, int], body: bytes) -> bytes:
    """A PNG from its parts; `kind` is (bits, colour type)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, *kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


#: name -> (bytes, what they show, the largest difference that the format's losses make)
LOSSLESS = {
    "png": (encoded(RGB, "PNG"), RGB, 0),
    "png rgba": (encoded(RGBA, "PNG"), WHITE, 0),
    "png grey": (encoded(GREY, "PNG"), GREY, 0),
    "png la": (encoded(RGBA.convert("LA"), "PNG"), WHITE.convert("L"), 0),
    "png palette": (encoded(PALETTE, "PNG"), PALETTE, 0),
    "png palette, one clear": (encoded(PALETTE, "PNG", transparency=3), clear_in(PALETTE, 3), 0),
    "png palette, alphas": (
        encoded(PALETTE, "PNG", transparency=bytes([255, 255, 255, 0])),
        clear_in(PALETTE, 3),
        0,
    ),
    "png 1 bit": (encoded(RGB.convert("1"), "PNG"), RGB.convert("1"), 0),
    "png 16 bit grey": (encoded(sixteen(GREY), "PNG"), GREY, 0),
    "png 16 bit rgb": (rgb16_png(), RGB, 0),
    "webp": (encoded(RGB, "WEBP", lossless=True), RGB, 0),
    "webp rgba": (encoded(RGBA, "WEBP", lossless=True), WHITE, 0),
    "webp animated": (
        encoded(RGB, "WEBP", lossless=True, save_all=True, append_images=[SECOND]),
        RGB,
        0,
    ),
    "gif": (encoded(PALETTE, "GIF"), PALETTE, 0),
    "gif animated": (
        encoded(PALETTE, "GIF", save_all=True, append_images=[SECOND.quantize(16)]),
        PALETTE,
        0,
    ),
    "gif clear": (encoded(PALETTE, "GIF", transparency=3), clear_in(PALETTE, 3), 0),
    "bmp": (encoded(RGB, "BMP"), RGB, 0),
    "tiff": (encoded(RGB, "TIFF"), RGB, 0),
    "tiff cmyk": (encoded(CMYK, "TIFF"), CMYK, 0),
    "tiff 16 bit": (encoded(sixteen(GREY), "TIFF"), GREY, 0),
    "ppm": (encoded(RGB, "PPM"), RGB, 0),
    "jpeg 2000": (encoded(RGB, "JPEG2000"), RGB, 0),
}
JPEGS = {
    "baseline": encoded(RGB, "JPEG", quality=90),
    "progressive": encoded(RGB, "JPEG", quality=90, progressive=True),
    "restart markers": encoded(RGB, "JPEG", restart_marker_rows=1),
    "4:4:4": encoded(RGB, "JPEG", subsampling=0),
    "4:2:2": encoded(RGB, "JPEG", subsampling=1),
    "rgb": encoded(RGB, "JPEG", keep_rgb=True),
    "grey": encoded(GREY, "JPEG"),
    "grey progressive": encoded(GREY, "JPEG", progressive=True),
    "cmyk": encoded(CMYK, "JPEG"),
    "two pictures": encoded(RGB, "MPO", save_all=True, append_images=[SECOND]),
    "one pixel": encoded(RGB.crop((0, 0, 1, 1)), "JPEG"),
}
if features.check("avif"):
    LOSSLESS["avif"] = (encoded(RGB, "AVIF", quality=100, subsampling="4:4:4"), RGB, 6)
    LOSSLESS["avif rgba"] = (encoded(RGBA, "AVIF", quality=100, subsampling="4:4:4"), WHITE, 6)


@pytest.mark.parametrize("name", LOSSLESS)
def test_formats(name):
    data, shown, loss = LOSSLESS[name]
    pixels = read_pixels(data)
    assert pixels.shape == (23, 37, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    difference = pixels.astype(int) - np.asarray(shown.convert("RGB"))
    assert abs(difference).max() <= loss


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_have_the_pixels_that_pillow_gives(name):
    np.testing.assert_array_equal(read_pixels(JPEGS[name]), by_pillow(JPEGS[name]))


@pytest.mark.parametrize("name", ["baseline", "progressive", "grey", "rgb", "two pictures"])
def test_common_jpegs_take_the_fast_path(name, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("Pillow decodes"))
    read_pixels(JPEGS[name])


@pytest.mark.parametrize("data", [*JPEGS.values(), *(d for d, *_ in LOSSLESS.values())])
def test_decode_is_read_pixels_as_a_picture(data):
    picture = decode(data)
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), read_pixels(data))
    np.testing.assert_array_equal(read_pixels(data), read_pixels(data))
    assert read_header(data).shorter == min(picture.size)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    upright = blobs(48, 32)
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the inverse of what sets it upright
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turned[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "AVIF": {"quality": 95}}
    data = encoded(stored, kind, exif=exif, **options.get(kind, {}))
    pixels = read_pixels(data)
    assert pixels.shape == (32, 48, 3)
    assert abs(pixels.astype(int) - np.asarray(upright)).mean() < 10  # a wrong turn: 50
    assert read_header(data).shorter == 32


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01", b"x"]
)
def test_exif_that_cannot_be_read_turns_nothing(kind, exif):
    assert read_pixels(encoded(RGB, kind, exif=exif)).shape == (23, 37, 3)


def test_a_jpeg_that_only_pillow_takes_is_decoded():
    data = JPEGS["baseline"]
    data = data[:-2] + b"stuff" + data[-2:]  # bytes before the end marker: libjpeg warns
    np.testing.assert_array_equal(read_pixels(data), by_pillow(JPEGS["baseline"]))


# What must be refused.


def test_why_a_picture_is_refused_is_the_same_in_every_process():
    """It stands in the parquet: no address in memory may be in it."""
    with pytest.raises(BadPicture) as error:
        read_pixels(b"no picture")
    assert str(error.value) == "cannot identify its format"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"\xff" * 1000,
        b"<html>404</html>",
        b"a text, no picture\n" * 50,
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xd9",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 50,
        b"GIF89a" + b"\0" * 50,
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    ],
)
def test_what_is_no_picture_is_undecodable(data):
    assert reason(data) == "undecodable"
    with pytest.raises(BadPicture):
        read_header(data)


@pytest.mark.parametrize("name", ["baseline", "progressive", "grey", "cmyk", "restart markers"])
@pytest.mark.parametrize("tenths", range(10))
def test_a_truncated_jpeg_is_undecodable(name, tenths):
    cut = len(JPEGS[name]) * tenths // 10
    assert reason(JPEGS[name][:cut]) == "undecodable"


@pytest.mark.parametrize("name", ["baseline", "progressive", "grey", "restart markers"])
def test_no_cut_of_a_jpeg_is_padded(name):
    """With the end marker put back as well, which makes Pillow take it and fill up with grey."""
    data, whole = JPEGS[name], read_pixels(JPEGS[name])
    scan = data.index(b"\xff\xda") + 20
    for cut, end in itertools.product(range(scan, len(data), 7), (b"", b"\xff\xd9")):
        found = pixels_or_reason(data[:cut] + end)
        # What passes is whole, or a progressive picture cut between two scans: not yet sharp.
        assert isinstance(found, str) or name == "progressive" or (found == whole).all()
        assert not isinstance(found, str) or found == "undecodable"


@pytest.mark.parametrize("name", ["png", "webp", "gif", "bmp", "tiff", "avif"])
@pytest.mark.parametrize("tenths", range(10))
def test_other_truncated_pictures_are_undecodable(name, tenths):
    if name not in LOSSLESS:
        pytest.skip("this Pillow has no AVIF")
    data = LOSSLESS[name][0]
    assert reason(data[: len(data) * tenths // 10]) == "undecodable"


def bombs() -> dict[str, bytes]:
    jpeg = bytearray(JPEGS["baseline"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    bmp = bytearray(encoded(RGB, "BMP"))
    bmp[18:26] = struct.pack("<ii", 20_000, 20_000)
    gif = bytearray(LOSSLESS["gif"][0])
    gif[6:10] = struct.pack("<HH", 20_000, 20_000)
    return {
        "png, whole": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
        "png, just over": png_of(12_001, 10_000, (8, 2), b""),
        "png, a number": png_of(2**31 - 1, 2**31 - 1, (8, 2), b""),
        "jpeg": bytes(jpeg),
        "bmp": bytes(bmp),
        "gif": bytes(gif),
    }


@pytest.mark.parametrize(("name", "data"), bombs().items())
def test_a_bomb_is_refused_by_its_header(name, data, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", lambda *_: pytest.fail("decoded"))
    assert reason(data) == "too-large"
    with pytest.raises(BadPicture) as error:
        read_header(data)
    assert error.value.reason == "too-large"


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = JPEGS["progressive"]
    last = data.rindex(b"\xff\xda")
    more = count - data.count(b"\xff\xda")
    return data[:-2] + data[last:-2] * more + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused_before_they_are_decoded(monkeypatch):
    """Each costs a pass over all pixels, and hardly a byte."""
    assert read_pixels(scans(images.MAX_SCANS)).shape == (23, 37, 3)
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert reason(scans(images.MAX_SCANS + 1)) == "too-large"


def test_what_lies_behind_a_jpeg_is_no_scan():
    data = JPEGS["baseline"]
    behind = data + b"\xff\xda" * (images.MAX_SCANS + 1)
    np.testing.assert_array_equal(read_pixels(behind), read_pixels(data))


def test_a_big_picture_that_is_allowed_is_no_warning():
    """Pillow warns from 89 million pixels on; here warnings are errors."""
    assert MAX_PIXELS >= 12_000 * 9_000 > (Image.MAX_IMAGE_PIXELS or 0)
    assert read_header(png_of(12_000, 9_000, (8, 2), b"")).shorter == 9_000


def test_threads_leave_the_warnings_as_they_were():
    before = list(warnings.filters)
    work = [JPEGS["baseline"], LOSSLESS["png"][0], b"nothing"] * 50

    def run() -> None:
        for data in work:
            try:
                read_pixels(data)
            except BadPicture:
                assert data == b"nothing"

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def assert_picture_or_reason(data: bytes) -> None:
    found = pixels_or_reason(data)
    if isinstance(found, str):
        assert found in ("undecodable", "too-large")
    else:
        assert found.shape[2] == 3
        assert found.dtype == np.uint8


HEADS = [b"", b"\xff\xd8\xff\xe1", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\1\0\0WEBPVP8X", b"BM"]
HEADS += [b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"P6 9 9 255\n", b"\0\0\0\x1cftypavif"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(HEADS), st.binary(max_size=300))
def test_random_bytes_give_a_picture_or_a_reason(head, tail):
    assert_picture_or_reason(head + tail)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([*JPEGS.values(), *(d for d, *_ in LOSSLESS.values())]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4))),
)
def test_damaged_pictures_give_a_picture_or_a_reason(data, edits):
    damaged = bytearray(data)
    for where, patch in edits:
        at = int(where * len(data))
        damaged[at : at + len(patch)] = patch
    assert_picture_or_reason(bytes(damaged))


# Resize and crop.


def pillow_fit(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """What fit stands for: Pillow's bicubic, then the central square."""
    height, width, _ = pixels.shape
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def drawn(kind: str, height: int, width: int) -> np.ndarray:
    """Pictures that bicubic overshoots, rounds and aliases on."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng([height, width])
    planes = {
        "noise": lambda: rng.integers(0, 256, (height, width, 3)),
        "black and white": lambda: rng.integers(0, 2, (height, width, 3)) * 255,
        "checker": lambda: (x + y) % 2 * 255,
        "stripes": lambda: x // 3 % 2 * 255,
        "edge": lambda: (x > width // 2) * 255,
        "ramp": lambda: np.stack([x % 256, y % 256, (x + y) % 256], -1),
        "flat": lambda: np.full((height, width, 3), 255),
    }[kind]()
    return np.broadcast_to(planes.reshape(height, width, -1), (height, width, 3)).astype(np.uint8)


def assert_near_pillow(pixels: np.ndarray, resolution: int) -> None:
    found = fit(pixels, resolution, small="upscale")
    assert found.shape == (resolution, resolution, 3)
    assert found.dtype == np.uint8
    difference = abs(found.astype(int) - pillow_fit(pixels, resolution))
    assert difference.max() <= LSB


SHAPES = [  # height, width, resolution
    (64, 64, 32),  # 1:1, 2x
    (128, 192, 64),  # 3:2, 2x
    (300, 200, 128),
    (32, 320, 16),  # 10:1
    (640, 64, 48),
    (65, 64, 64),  # a pixel larger
    (64, 65, 64),
    (65, 65, 64),
    (257, 391, 256),
    (127, 211, 64),
    (700, 900, 16),  # 44x
    (97, 1301, 32),
    (48, 72, 64),  # enlarged
    (63, 63, 64),
    (10, 13, 64),
    (1, 1, 16),
]


@pytest.mark.parametrize(
    "kind", ["noise", "black and white", "checker", "stripes", "edge", "ramp", "flat"]
)
@pytest.mark.parametrize(("height", "width", "resolution"), SHAPES)
def test_fit_is_pillow_to_two_lsb(kind, height, width, resolution):
    assert_near_pillow(drawn(kind, height, width), resolution)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["noise", "black and white", "checker", "ramp"]),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 100),
)
def test_fit_is_pillow_at_any_size(kind, height, width, resolution):
    if max(height, width) / min(height, width) * resolution < 5_000:
        assert_near_pillow(drawn(kind, height, width), resolution)


@pytest.mark.parametrize(("width", "height"), [(1024, 768), (2250, 1500)])
@pytest.mark.parametrize("resolution", [256, 512])
def test_a_jpeg_from_bytes_to_square_is_pillows_to_two_lsb(width, height, resolution):
    data = encoded(blobs(width, height), "JPEG", quality=90)
    found = fit(read_pixels(data), resolution)
    assert abs(found.astype(int) - pillow_fit(by_pillow(data), resolution)).max() <= LSB


def test_resizing_stays_in_the_layout_that_is_fast():
    assert images.resize(drawn("noise", 90, 160), 32, 57).flags.c_contiguous


def test_fit_takes_arrays_and_pictures_alike():
    pixels = drawn("noise", 90, 160)
    wanted = fit(pixels, 32)
    np.testing.assert_array_equal(fit(Image.fromarray(pixels), 32), wanted)
    np.testing.assert_array_equal(fit(np.asarray(Image.fromarray(pixels)), 32), wanted)
    np.testing.assert_array_equal(fit(pixels[:, ::-1][:, ::-1], 32), wanted)
    np.testing.assert_array_equal(fit(pixels, 32), wanted)


@pytest.mark.parametrize("pixels", [np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))])
def test_fit_refuses_other_arrays(pixels):
    with pytest.raises(ValueError, match="uint8"):
        fit(pixels, 4)


def test_a_picture_of_the_right_size_is_untouched_and_copied():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    found = fit(pixels, 4)
    np.testing.assert_array_equal(found, pixels)
    found[:] = 0
    assert pixels.any()
    assert fit(drawn("noise", 9, 5), 5).flags.c_contiguous


def test_enlarging_is_refused_or_asked_for():
    image = blobs(300, 200)
    with pytest.raises(BadPicture) as error:
        fit(image, 256)
    assert error.value.reason == "too-small"
    assert fit(image, 256, small="upscale").shape == (256, 256, 3)
    assert fit(image, 200).shape == (200, 200, 3)


def test_a_line_is_not_enlarged_to_gigabytes():
    with pytest.raises(BadPicture) as error:
        fit(np.zeros((1, 30_000, 3), np.uint8), 512, small="upscale")
    assert error.value.reason == "too-large"


def test_no_crop_wants_a_square():
    assert fit(drawn("noise", 300, 300), 64, "none").shape == (64, 64, 3)
    assert fit(drawn("noise", 300, 301), 64, "none").shape == (64, 64, 3)  # 64 x 64 once resized
    with pytest.raises(BadPicture) as error:
        fit(drawn("noise", 300, 310), 64, "none")
    assert error.value.reason == "not-square"


def ramp(width: int, height: int) -> np.ndarray:
    """Red tells the column, green the row."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize(("width", "height", "axis"), [(200, 50, 0), (50, 200, 1)])
def test_random_crops_depend_on_seed_and_key_alone(width, height, axis):
    def start(seed: int, key: str) -> int:
        return int(fit(ramp(width, height), 50, "random", seed, key)[0, 0, axis])

    starts = [start(0, f"{n:04d}") for n in range(600)]
    assert starts == [start(0, f"{n:04d}") for n in range(600)]
    assert (min(starts), max(starts)) == (0, 150)  # both ends can be reached
    assert 65 < np.mean(starts) < 85
    assert starts[:9] != [start(1, f"{n:04d}") for n in range(9)]


def test_random_crops_show_the_same_part_at_every_resolution():
    for n in range(20):
        large, small = (fit(ramp(240, 120), r, "random", key=str(n)) for r in (120, 60))
        assert abs(int(large[50, 60, 0]) - int(small[25, 30, 0])) <= 3


@pytest.mark.parametrize("settings", [{"crop": "middle"}, {"small": "pad"}])
def test_unknown_rules_are_errors(settings):
    with pytest.raises(ValueError, match="known are"):
        fit(RGB, 8, **settings)


def test_importing_it_loads_no_torch():
    code = "import sys, pipeline.core.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("width", "height", "resolution", "apart"),
    [
        *((203, 200, 200, 1.0), (204, 200, 200, 0.0), (200, 205, 200, 0.0)),  # crops alone
        *((643, 480, 256, 1.0), (480, 643, 256, 1.0), (1003, 750, 64, 1.0), (300, 300, 64, 0.0)),
    ],
)
def test_crops_are_at_most_a_pixel_from_the_official_codes(width, height, resolution, apart):
    """Its transforms are torchvision's Resize and CenterCrop, which round otherwise than we do."""
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    longer = max(width, height)
    row = np.linspace(0, 255, longer).round().astype(np.uint8)
    pixels = np.broadcast_to(row[:, None] if height > width else row[None], (height, width))
    picture = Image.fromarray(np.repeat(pixels[..., None], 3, axis=2))
    official = CenterCrop(resolution)(Resize(resolution, InterpolationMode.BICUBIC)(picture))
    ours = fit(picture, resolution).astype(int)
    step = 255 / (longer * resolution / min(width, height))  # from a pixel to the next
    assert np.abs(ours - np.asarray(official)).max() <= LSB + apart * step

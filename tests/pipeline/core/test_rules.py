"""Which pictures are kept and in what form."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.core.images import decode, read_pixels
from pipeline.core.rules import Rules, keep
from pipeline.core.samples import ImageRef, ImageSample, RawImage, Reject

REF = ImageRef("000000000", "x:", "a picture")


def drawn(width: int, height: int) -> Image.Image:
    """Smooth colours with an edge."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y - x), np.sign(x - 0.4)]
    return Image.fromarray((127.5 + 110 * np.stack(waves, -1)).astype(np.uint8))


def raw(picture: Image.Image, kind: str = "JPEG", **options) -> RawImage:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return RawImage(REF, buffer.getvalue())


def kept(item: RawImage, **rules) -> ImageSample:
    found = keep(item, Rules(**rules))
    assert isinstance(found, ImageSample), found
    return found


def reason(item: RawImage, **rules) -> str:
    found = keep(item, Rules(**rules))
    assert isinstance(found, Reject), found
    return found.reason


@pytest.mark.parametrize(
    ("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("MPO", "jpg")]
)
def test_bytes_stay_as_they_came(kind, extension):
    item = raw(drawn(600, 512), kind)
    found = kept(item)
    assert (found.data, found.extension) == (item.data, extension)
    assert (found.width, found.height, found.original_width) == (600, 512, 600)


def test_a_larger_picture_is_shrunk_once_at_quality_95():
    item = raw(drawn(1500, 1000), quality=97)
    found = kept(item)
    assert found.extension == "jpg"
    assert (found.width, found.height) == (768, 512)
    assert (found.original_width, found.original_height) == (1500, 1000)
    wanted = decode(item.data).resize((768, 512), Image.Resampling.BICUBIC)
    error = read_pixels(found.data).astype(float) - np.asarray(wanted, float)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 38
    poor = kept(item, encode_quality=75)
    assert len(poor.data) < 0.7 * len(found.data)


def test_orientation_counts_for_sizes_and_is_kept_or_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    small = kept(raw(drawn(600, 512), exif=exif))
    assert (small.width, small.height) == (512, 600)
    assert read_pixels(small.data).shape == (600, 512, 3)
    large = kept(raw(drawn(1500, 1000), exif=exif))
    assert (large.width, large.height, large.original_width) == (512, 768, 1000)
    assert Image.open(io.BytesIO(large.data)).getexif().get(0x0112) is None
    assert read_pixels(large.data).shape == (768, 512, 3)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_what_tars_do_not_hold_becomes_png_of_the_same_pixels(kind):
    item = raw(drawn(300, 260).quantize() if kind == "GIF" else drawn(300, 260), kind)
    found = kept(item)
    assert found.extension == "png"
    np.testing.assert_array_equal(read_pixels(found.data), read_pixels(item.data))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(kind):
    frames = [drawn(300, 260), drawn(300, 260).rotate(90), drawn(300, 260).rotate(180)]
    item = raw(frames[0], kind, save_all=True, append_images=frames[1:])
    found = kept(item)
    assert found.extension == "png"
    assert not getattr(Image.open(io.BytesIO(found.data)), "is_animated", False)
    np.testing.assert_array_equal(read_pixels(found.data), read_pixels(item.data))


def test_sizes_are_judged_as_the_picture_came():
    assert reason(raw(drawn(255, 900))) == "too-small"
    assert kept(raw(drawn(256, 900))).width == 256
    assert reason(raw(drawn(900, 700)), max_image_area=600_000) == "too-large"
    assert reason(raw(drawn(900, 300)), max_aspect_ratio=2.9) == "aspect-ratio"
    assert kept(raw(drawn(900, 300)), max_aspect_ratio=3).height == 300
    assert kept(raw(drawn(900, 700)), image_size=None).data == raw(drawn(900, 700)).data
    assert kept(raw(drawn(20, 20)), min_image_size=0).width == 20


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_small_picture_is_not_decoded(monkeypatch, kind):
    monkeypatch.setattr("pipeline.core.rules.read", lambda data: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert reason(raw(drawn(255, 900), kind)) == "too-small"


def test_a_png_may_say_at_its_end_how_it_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = raw(drawn(600, 512), "PNG").data
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    found = kept(RawImage(REF, data[:-12] + chunk + data[-12:]))
    assert (found.width, found.height) == (512, 600)
    assert read_pixels(found.data).shape == (600, 512, 3)


def test_broken_ones_are_found():
    item = raw(drawn(600, 512))
    assert reason(replace(item, data=item.data[: len(item.data) // 2])) == "undecodable"
    assert reason(replace(item, data=b"")) == "undecodable"
    assert reason(replace(item, data=b"<html>not here</html>")) == "undecodable"


def test_captions_hold_no_control_characters_and_have_a_bound():
    item = raw(drawn(300, 300))
    odd = replace(REF, caption=" a\x00 b\ud83d\n\tc ", references=("x\x07y",))
    found = kept(replace(item, ref=odd))
    assert (found.ref.caption, found.ref.references) == ("a b c", ("x y",))
    long = replace(REF, caption="word " * 3000)
    assert reason(replace(item, ref=long)) == "caption-too-long"
    long = replace(REF, references=("word " * 3000,))
    assert keep(replace(item, ref=long), Rules()) == Reject(
        REF.key, "download", "caption-too-long", "a caption of 14999 characters"
    )
    assert reason(replace(item, ref=replace(REF, caption="\x00\x07"))) == "no-caption"
    assert kept(replace(item, ref=replace(REF, caption=""))).ref.caption == ""  # for a captioner


def test_the_same_bytes_give_the_same_bytes():
    item = raw(drawn(1500, 1000))
    assert kept(item) == kept(item)

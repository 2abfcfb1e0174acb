from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.core.images import BadPicture, decode, fit


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    image = Image.new("RGB", (5, 4), (200, 200, 200))
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    found = decode(encoded(image, kind))
    assert found.mode == "RGB"
    assert found.size == (5, 4)


def test_transparency_is_flattened_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    found = decode(encoded(image, "PNG"))
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((1, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[274] = 6  # rotate 90 degrees clockwise
    assert decode(encoded(Image.new("RGB", (6, 3)), "JPEG", exif=exif)).size == (3, 6)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_what_is_no_picture_is_undecodable(data):
    with pytest.raises(BadPicture) as error:
        decode(data)
    assert error.value.reason == "undecodable"


def test_a_truncated_picture_is_undecodable():
    data = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    with pytest.raises(BadPicture, match="truncated"):
        decode(data[: len(data) // 2])


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    data = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadPicture) as error:
        decode(data)
    assert error.value.reason == "too-large"


def test_fit_equals_pillow_resize_and_centre_crop():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (90, 160, 3), dtype=np.uint8))
    resized = image.resize((round(160 * 32 / 90), 32), Image.Resampling.BICUBIC)
    left = (resized.width - 32) // 2
    expected = np.asarray(resized.crop((left, 0, left + 32, 32)))
    np.testing.assert_array_equal(fit(image, 32), expected)
    assert fit(image, 32).shape == (32, 32, 3)


def test_a_picture_of_the_right_size_is_untouched():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    np.testing.assert_array_equal(fit(image, 4), np.asarray(image))


def test_enlarging_is_refused():
    with pytest.raises(BadPicture) as error:
        fit(Image.new("RGB", (300, 200)), 256)
    assert error.value.reason == "too-small"

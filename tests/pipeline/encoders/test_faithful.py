"""What goes into a folder comes out of the tar: by Pillow's own reckoning, and read by webdataset.

The official code loses RGBA, palette, 16-bit and CMYK pictures, and stores the rest at quality 75.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.sources.folder import Folder
from pipeline.stages.download import Download
from tests.hostile.pictures import encoded, photo
from tests.pipeline.helpers.roots import run_here

SMALL, LARGE = (320, 256), (700, 560)  # below and above image_size, 512


def rgba(picture: Image.Image) -> Image.Image:
    alpha = np.tile(np.linspace(0, 255, picture.width).astype(np.uint8), (picture.height, 1))
    return Image.merge("RGBA", [*picture.split(), Image.fromarray(alpha)])


def few(picture: Image.Image) -> Image.Image:
    """With a palette of 64 colours."""
    return picture.quantize(64, method=Image.Quantize.FASTOCTREE)


def grey16(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 256 + 200)


def animated(picture: Image.Image, kind: str, **options) -> bytes:
    frames = [picture.transpose(Image.Transpose.ROTATE_180)]
    return encoded(picture, kind, save_all=True, append_images=frames, **options)


def turned(picture: Image.Image, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture, kind, exif=exif)


#: name -> (what makes its bytes, extension of a small one in the tar)
KINDS = {
    "jpeg.jpg": (lambda p: encoded(p, "JPEG", quality=90), "jpg"),
    "progressive.jpg": (lambda p: encoded(p, "JPEG", progressive=True), "jpg"),
    "quality-100.jpg": (lambda p: encoded(p, "JPEG", quality=100, subsampling=0), "jpg"),
    "grey.jpg": (lambda p: encoded(p.convert("L"), "JPEG"), "jpg"),
    "cmyk.jpg": (lambda p: encoded(p.convert("CMYK"), "JPEG"), "jpg"),
    "turned.jpg": (lambda p: turned(p, "JPEG"), "jpg"),
    "turned.png": (lambda p: turned(p, "PNG"), "png"),
    "rgb.png": (lambda p: encoded(p, "PNG"), "png"),
    "rgba.png": (lambda p: encoded(rgba(p), "PNG"), "png"),
    "palette.png": (lambda p: encoded(few(p), "PNG"), "png"),
    "palette-clear.png": (lambda p: encoded(few(p), "PNG", transparency=5), "png"),
    "grey16.png": (lambda p: encoded(grey16(p), "PNG"), "png"),
    "animated.png": (lambda p: animated(p, "PNG"), "png"),
    "lossy.webp": (lambda p: encoded(p, "WEBP"), "webp"),
    "rgba.webp": (lambda p: encoded(rgba(p), "WEBP", lossless=True), "webp"),
    "animated.webp": (lambda p: animated(p, "WEBP", lossless=True), "png"),
    "animated.gif": (lambda p: animated(few(p), "GIF"), "png"),
    "rgb.bmp": (lambda p: encoded(p, "BMP"), "png"),
    "cmyk.tiff": (lambda p: encoded(p.convert("CMYK"), "TIFF"), "png"),
    "grey16.tiff": (lambda p: encoded(grey16(p), "TIFF"), "png"),
}
if features.check("avif"):
    KINDS["lossy.avif"] = (lambda p: encoded(p, "AVIF"), "png")


class Stored(NamedTuple):
    given: bytes
    extension: str
    data: bytes
    row: dict


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[tuple[str, tuple[int, int]], Stored]:
    """Every kind in both sizes, through the stage."""
    import webdataset

    home = tmp_path_factory.mktemp("faithful")
    (home / "in").mkdir()
    names = {}
    for number, (name, (make, _)) in enumerate(KINDS.items()):
        for size in (SMALL, LARGE):
            file = f"{'small' if size == SMALL else 'large'}-{name}"
            names[file] = name, size
            (home / "in" / file).write_bytes(make(photo(*size, seed=number)))
    store = Store(home / "root")
    source = Folder(folder=str(home / "in"), captions="none", samples_per_shard=1000)
    run_here(Download("folder", source), store)
    rows = from_parquet(store.read("folder/images/00000.parquet")).to_pylist()
    tar = webdataset.WebDataset(store.url("folder/images/00000.tar"), shardshuffle=False)  # pyright: ignore
    found = {}
    for row, sample in zip(rows, tar, strict=True):
        assert row["status"] == "success", row
        assert sample["__key__"] == row["key"]
        (extension,) = {"jpg", "png", "webp"} & set(sample)
        given = (home / "in" / row["url"]).read_bytes()
        found[names[row["url"]]] = Stored(given, extension, sample[extension], row)
    return found


def by_pillow(data: bytes) -> np.ndarray:
    """(H, W, 3): upright, the first frame, on white."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if picture.mode == "I;16":
        levels = (np.asarray(picture) >> 8).astype(np.uint8)
        return np.repeat(levels[..., None], 3, axis=2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("name", KINDS)
def test_a_small_picture_is_kept_to_the_last_bit(stored, name):
    found = stored[name, SMALL]
    assert found.extension == KINDS[name][1]
    np.testing.assert_array_equal(by_pillow(found.data), by_pillow(found.given))
    height, width, _ = by_pillow(found.given).shape
    row = found.row
    assert (row["width"], row["height"]) == (width, height)
    assert (row["original_width"], row["original_height"]) == (width, height)


@pytest.mark.parametrize("name", [n for n in KINDS if "animated" not in n])
def test_bytes_of_common_formats_are_untouched(stored, name):
    found = stored[name, SMALL]
    assert (found.data == found.given) == name.endswith(("jpg", "png", "webp"))


@pytest.mark.parametrize("name", KINDS)
def test_a_large_picture_is_shrunk_as_pillow_would_at_quality_95(stored, name):
    found = stored[name, LARGE]
    assert found.extension == "jpg"
    original = by_pillow(found.given)
    height, width, _ = original.shape
    row = found.row
    assert (row["original_width"], row["original_height"]) == (width, height)
    assert min(row["width"], row["height"]) == 512
    assert row["width"] / row["height"] == pytest.approx(width / height, rel=2e-3)
    size = row["width"], row["height"]
    wanted = Image.fromarray(original).resize(size, Image.Resampling.BICUBIC)
    pillow = encoded(wanted, "JPEG", quality=95, subsampling=0)
    ours = Image.open(io.BytesIO(found.data))
    assert ours.size == size
    assert ours.quantization == Image.open(io.BytesIO(pillow)).quantization  # pyright: ignore
    assert len(found.data) == pytest.approx(len(pillow), rel=0.02)
    target = np.asarray(wanted, float)
    error = abs(np.asarray(ours, float) - target).mean()
    assert error <= abs(by_pillow(pillow).astype(float) - target).mean() + 0.05


def test_a_turned_picture_is_as_wide_as_it_looks(stored):
    for size in (SMALL, LARGE):
        row = stored["turned.jpg", size].row
        assert (row["original_width"], row["original_height"]) == size[::-1]


def test_the_least_size_is_that_of_the_original(tmp_path):
    """Not of what is stored: 600x255 is too small however it is shrunk; 256 is enough."""
    (tmp_path / "in").mkdir()
    for height in (255, 256):
        data = encoded(photo(600, height), "JPEG")
        (tmp_path / "in" / f"{height}.jpg").write_bytes(data)
    store = Store(tmp_path / "root")
    run_here(Download("folder", Folder(folder=str(tmp_path / "in"), captions="none")), store)
    rows = from_parquet(store.read("folder/images/00000.parquet")).to_pylist()
    assert [row["status"] for row in rows] == ["too-small", "success"]

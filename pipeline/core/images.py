"""Encoded bytes to the pixels an encoder sees: pure functions that decode, resize and crop."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.core import colour, metadata, modes
from pipeline.core.errors import BadPicture

MAX_PIXELS = 120_000_000  # larger headers are refused before a pixel is decoded
#: Scans of a progressive JPEG; usual are 10. Each costs a pass over all pixels, and 100 bytes are
#: enough for one: without a limit 400 KB take minutes.
MAX_SCANS = 100

#: What Pillow may try on bytes from anywhere: never those that run a program (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "HEIF")

Crop = Literal["center", "random", "none"]
Small = Literal["reject", "upscale"]


class Header(NamedTuple):
    """What the first bytes of a picture say; no pixel is decoded."""

    format: str  # Pillow's name, e.g. "JPEG"
    width: int  # upright, pixels
    height: int
    animated: bool

    @property
    def shorter(self) -> int:
        return min(self.width, self.height)


def read_header(data: bytes) -> Header:
    """Format and size. A PNG may say how it is turned behind its pixels: that is not seen here.

    Raises:
        BadPicture: "undecodable" or "too-large".
    """
    with _judged():
        image = _open(data)
        width, height = image.size
        # The base class's: PNG's own decodes every picture in search of EXIF at its end.
        if _orientation(image, Image.Image.getexif) in _LYING:
            width, height = height, width
        # Their headers tell; a GIF would be read to its end.
        animated = image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False)
        return Header(image.format or "", width, height, animated)


class Read(NamedTuple):
    """A picture's pixels, and what became of its colour profile."""

    pixels: np.ndarray  # (H, W, 3) uint8, contiguous and writable
    profile: str  # colour.CONVERTED, colour.IGNORED, or "": it has none, or sRGB's


def read(data: bytes) -> Read:
    """Encoded bytes to upright sRGB; transparency on white, of an animation the first frame.

    libjpeg-turbo decodes RGB and grey JPEGs without Pillow's copies, to the same pixels. Pillow
    decodes the rest, and whatever libjpeg-turbo has doubts about.

    Raises:
        BadPicture: "undecodable" or "too-large".
    """
    with _judged():
        image = _open(data)
        pixels, profile = _jpeg(data, image) or _pillow(data, image)
        turn = _UPRIGHT.get(_orientation(image))
        if turn is not None:
            pixels = np.array(Image.fromarray(pixels).transpose(turn))
        return Read(pixels, profile or _unread_profile(data, image))


def read_pixels(data: bytes) -> np.ndarray:
    """The pixels of `read`: (H, W, 3) uint8, contiguous and writable.

    Raises:
        BadPicture: "undecodable" or "too-large".
    """
    return read(data).pixels


def decode(data: bytes) -> Image.Image:
    """`read_pixels` as a Pillow picture in mode RGB.

    Raises:
        BadPicture: "undecodable" or "too-large".
    """
    return Image.fromarray(read_pixels(data))


def upright(image: Image.Image) -> Image.Image:
    """What `decode` gives, of a picture that was opened by somebody else.

    Raises:
        BadPicture: "undecodable" or "too-large".
    """
    with _judged():
        turn = _UPRIGHT.get(_orientation(image))
        shown, _ = modes.to_rgb(image)
        return shown if turn is None else shown.transpose(turn)


def once_misread(data: bytes) -> bool:
    """Whether the first version read other pixels of a stored picture; none is decoded."""
    try:
        with _judged():
            return modes.once_misread(_open(data))
    except BadPicture:
        return False


def profile_changes(data: bytes) -> bool:
    """Whether a reader that takes no notice of colour profiles sees other colours."""
    try:
        with _judged():
            image = _open(data)
            return colour.changes(image.info.get("icc_profile"), modes.base_mode(image))
    except BadPicture:
        return False


def orientation(data: bytes) -> int:
    """How the picture is turned, 1 to 8; 1 where nothing says so.

    Raises:
        BadPicture: "undecodable" or "too-large".
    """
    with _judged():
        found = _orientation(_open(data))
        return found if isinstance(found, int) and found in _UPRIGHT else 1


def fit(
    picture: np.ndarray | Image.Image,
    resolution: int,
    crop: Crop = "center",
    seed: int = 0,
    key: str = "",
    small: Small = "reject",
) -> np.ndarray:
    """Shorter side to `resolution` (bicubic, antialiased), then a square of that size.

    At most 2 of 255 from Pillow's BICUBIC and the same crop. Several resolutions of one picture:
    call it on the original for each.

    Args:
        picture: (H, W, 3) uint8 RGB, or a Pillow picture.
        resolution: pixels a side.
        crop: "center"; "random", at a relative place that (seed, key) alone decide, so two
            resolutions of a picture show the same part; "none", the whole picture or nothing.
        small: "reject" or "upscale" a picture whose shorter side is below `resolution`.

    Returns:
        (resolution, resolution, 3) uint8, a copy.

    Raises:
        BadPicture: "too-small"; "not-square", for crop "none"; "too-large", where enlarging would
            need more than MAX_PIXELS.
    """
    if crop not in ("center", "random", "none"):
        raise ValueError(f"crop={crop!r}: known are 'center', 'random', 'none'")
    if small not in ("reject", "upscale"):
        raise ValueError(f"small={small!r}: known are 'reject', 'upscale'")
    pixels = _array(picture)
    height, width, _ = pixels.shape
    shorter = min(width, height)
    if shorter < resolution and small == "reject":
        raise BadPicture("too-small", f"{width}x{height}, needs {resolution} on the shorter side")
    scale = resolution / shorter
    wide, high = (max(resolution, round(side * scale)) for side in (width, height))
    if crop == "none" and wide != high:
        raise BadPicture("not-square", f"{width}x{height} is {wide}x{high} at {resolution}")
    if shorter < resolution and wide * high > MAX_PIXELS:
        raise BadPicture("too-large", f"{width}x{height} enlarged to {wide}x{high} pixels")
    if shorter != resolution:
        pixels = resize(pixels, high, wide)
    top, left = (_offset(side - resolution, crop, seed, key) for side in (high, wide))
    return pixels[top : top + resolution, left : left + resolution].copy()


def _array(picture: np.ndarray | Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 that torch can wrap: in C order and writable, or it warns."""
    if isinstance(picture, Image.Image):
        return np.array(picture.convert("RGB"))
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"pixels are (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
    return np.require(picture, requirements=["C", "W"])


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height, width, 3), bicubic with antialiasing.

    torch has Pillow's filter in SIMD for uint8 in channels_last, which is how an (H, W, 3) array
    lies in memory. It tells by the batch's stride as well, so the batch is added before the
    permutation, not after it: the other way round the result is channels-first, and slower.
    """
    import torch

    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, H, W)
    resized = torch.nn.functional.interpolate(
        image, size=(height, width), mode="bicubic", antialias=True
    )
    return resized.permute(0, 2, 3, 1)[0].numpy()


def _offset(slack: int, crop: Crop, seed: int, key: str) -> int:
    """Where the square begins, 0 to `slack` pixels; one of the two sides has no slack."""
    if crop != "random":
        return slack // 2
    digest = hashlib.sha256(f"crop:{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * (slack + 1) >> 64


def _open(data: bytes) -> Image.Image:
    """The picture with its header read and its size judged."""
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIC and "HEIF" not in _formats():
            raise BadPicture("undecodable", NO_HEIC) from None
        raise
    except ValueError:  # a PNG's profile or text that inflates to megabytes: neither is a pixel
        plain = metadata.without(data, profile=True)
        if plain is None or plain == data:
            raise
        image = Image.open(io.BytesIO(plain), formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        raise BadPicture("too-large", f"{image.width}x{image.height} pixels")
    if image.width * image.height == 0:
        raise BadPicture("undecodable", f"{image.width}x{image.height} pixels")
    return image


#: Brands of HEIF files that hold HEVC, which iPhones take pictures in.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
NO_HEIC = "HEIC, which needs the extra `phones`: pip install 'microdit[phones]'"


@functools.cache
def _formats() -> tuple[str, ...]:
    """FORMATS that this Pillow was built with, and HEIF where the extra `phones` is installed."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _jpeg(data: bytes, image: Image.Image) -> tuple[np.ndarray, str] | None:
    """Pixels and note of an RGB or grey JPEG, or None: Pillow has to decide."""
    if image.format not in ("JPEG", "MPO"):
        return None
    # The bytes of a sequential scan grow with its pixels; looking for scans takes 6 % of decoding.
    if "progressive" in image.info and (scans := _scans(data)) > MAX_SCANS:
        raise BadPicture("too-large", f"{scans} scans")
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != image.size or space not in ("YCbCr", "RGB", "Gray"):
            return None
        pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        # An end marker before the last pixel: a download that broke off and was closed properly.
        # Pillow would fill the rest with grey. What else libjpeg warns of may be harmless.
        if "premature end of data segment" in str(error):
            raise BadPicture("undecodable", f"truncated: {error}") from error
        return None
    profile = image.info.get("icc_profile")
    if not profile:
        return pixels, ""
    grey = space == "Gray"
    shown, note = colour.to_srgb(Image.fromarray(pixels[..., 0] if grey else pixels), profile)
    return (np.array(shown) if note == colour.CONVERTED else pixels), note


def _scans(data: bytes) -> int:
    """How many scans a JPEG has up to its end: a phone's film may lie behind it."""
    at, scans = 2, 0
    while found := _MARKER.search(data, at):
        marker, at = found[0][1], found.end()
        if marker == 0xD9:
            break
        scans += marker == 0xDA
        at += int.from_bytes(data[at : at + 2], "big")  # the segment's length
    return scans


_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # those inside a scan, and without length, out


def _pillow(data: bytes, image: Image.Image) -> tuple[np.ndarray, str]:
    """(H, W, 3) uint8 of whatever Pillow has opened, and what became of its profile."""
    shown, note = modes.to_rgb(image, data)
    return np.array(shown), note


def _unread_profile(data: bytes, image: Image.Image) -> str:
    """IGNORED, where a PNG has a profile that Pillow could not even unpack."""
    packed = image.format == "PNG" and not image.info.get("icc_profile") and b"iCCP" in data[:1024]
    return colour.IGNORED if packed else ""


def _orientation(
    image: Image.Image, exif: Callable[[Any], Image.Exif] = lambda image: image.getexif()
) -> object:
    """The EXIF orientation, 1 to 8. EXIF that cannot be read turns nothing: the pixels are good."""
    try:
        return exif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


#: EXIF orientation -> what sets the picture upright; Pillow is faster at it than numpy's views.
_UPRIGHT: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # of them, those that swap width and height


@contextmanager
def _judged() -> Iterator[None]:
    """What goes wrong inside is the picture's fault, and its BadPicture says how."""
    try:
        with _QUIET:
            yield
    except (BadPicture, MemoryError):  # the latter is the machine's fault: sizes are bounded
        raise
    except UnidentifiedImageError as error:  # its text holds an address in memory
        raise BadPicture("undecodable", "cannot identify its format") from error
    except Image.DecompressionBombError as error:
        raise BadPicture("too-large", str(error)) from error
    except Exception as error:  # Pillow's decoders raise whatever their C libraries make of a file
        raise BadPicture("undecodable", f"{type(error).__name__}: {error}") from error


class _Quiet:
    """Hides Pillow's warnings of big pictures and odd EXIF, whatever the process does with
    warnings: the same bytes must get the same verdict.

    `catch_warnings` alone swaps global state and comes apart where threads overlap: here the first
    one in swaps it and the last one out swaps it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


_QUIET = _Quiet()

"""JPEG bytes to the square of pixels that an encoder sees: ours against Pillow's, on one core."""

from __future__ import annotations

import functools
import io
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageCms

from benchmarks.rows import REPEATS, Row
from pipeline.core.images import fit, read_pixels
from tests.pipeline.helpers import profiles

SIZES = ((1024, 768), (2250, 1500))  # a picture of the web, and one of SA1B
RESOLUTIONS = (512, 256)
RATIO = 2.4  # wanted
LSB = 2  # of 255, allowed
SAME = 1.05  # what a profile that changes nothing may cost
CALLS = 10  # a repeat


def rows() -> Iterator[Row]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for width, height in SIZES:
            data = _photo(width, height)
            for resolution in RESOLUTIONS:
                yield _row(data, resolution, f"{width}×{height}, {len(data) / 1e3:.0f} kB")
        yield _profiles_row()
    finally:
        torch.set_num_threads(threads)


def _row(data: bytes, resolution: int, shown: str) -> Row:
    def ours() -> np.ndarray:
        return fit(read_pixels(data), resolution)

    def pillows() -> np.ndarray:
        return _by_pillow(data, resolution)

    difference = abs(ours().astype(int) - pillows())
    spent = [_cpu_s(pillows, ours) for _ in range(REPEATS)]
    ratio = statistics.median(theirs / mine for theirs, mine in spent)
    theirs, mine = (1e3 * statistics.median(side) for side in zip(*spent, strict=True))
    return Row(
        f"decode, resize and crop a JPEG ({shown}, q90) to {resolution}, one core, against Pillow",
        f"{ratio:.2f}× ({mine:.1f} against {theirs:.1f} ms), at most {difference.max()} LSB apart "
        f"in {(difference > 0).mean():.2%} of values",
        f"{RATIO}×, {LSB} LSB",
        ratio >= RATIO and bool(difference.max() <= LSB),
    )


def _profiles_row() -> Row:
    """What a colour profile costs: sRGB's nothing, a phone's its conversion."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kinds = [_photo(*SIZES[0], profile=profile) for profile in (None, srgb, profiles.rgb())]
    sides = [functools.partial(read_pixels, data) for data in kinds]
    spent = [_cpu_s(*sides) for _ in range(REPEATS)]
    plain, same, phone = (1e3 * statistics.median(side) for side in zip(*spent, strict=True))
    ratio = statistics.median(same / plain for plain, same, _ in spent)
    return Row(
        f"decode a JPEG ({SIZES[0][0]}×{SIZES[0][1]}, q90) with sRGB's profile, against without",
        f"{ratio:.2f}× ({same:.1f} against {plain:.1f} ms); with Display P3's {phone:.1f} ms",
        f"{SAME}×",
        ratio <= SAME,
    )


def _by_pillow(data: bytes, resolution: int) -> np.ndarray:
    """What the official precompute does for each resolution; (resolution, resolution, 3) uint8."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def _cpu_s(*sides: Callable[[], object]) -> tuple[float, ...]:
    """CPU seconds a call of each, called in turn: what else the machine does meets all alike."""
    spent = [0.0] * len(sides)
    for _ in range(CALLS):
        for n, side in enumerate(sides):
            started = time.process_time()
            side()
            spent[n] += time.process_time() - started
    return tuple(seconds / CALLS for seconds in spent)


def _photo(width: int, height: int, seed: int = 0, profile: bytes | None = None) -> bytes:
    """A JPEG with a photograph's spectrum, and so its bits a pixel: noise whose amplitude falls
    with frequency, mostly grey."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no offset

    def plane(slope: float) -> np.ndarray:
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**slope
        values = np.fft.irfft2(spectrum, s=(height, width))
        return values / values.std()

    grey = plane(1.4)
    pixels = np.stack([128 + 50 * (grey + 0.4 * plane(1.6)) for _ in range(3)], -1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=90, icc_profile=profile
    )
    return buffer.getvalue()

"""Colour profiles: what a picture's numbers mean, brought to sRGB by LittleCMS.

Relative colorimetric with black point compensation, as browsers and photo editors do. A profile
that is sRGB by what it does costs nothing; the transform of any other is made once.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms

MAX_BYTES = 4_000_000  # the largest of presses and scanners have 3 MB
NO_CHANGE = 2  # levels of 255 by which a profile may differ from sRGB and still be it

#: Counters of what became of profiles.
CONVERTED = "colour profiles converted"
IGNORED = "colour profiles ignored"

_REMEMBERED = 128  # transforms
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # ICC's name -> Pillow's mode
_PICTURES = ("scnr", "mntr", "prtr", "spac")  # device classes that say what numbers look like


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """A picture in mode RGB, L, CMYK or LAB as RGB, and CONVERTED, IGNORED or "".

    A profile that is broken, over MAX_BYTES, or of another kind of colours than the picture's is
    ignored. Grey pictures may have one for RGB. LAB needs none.
    """
    if image.mode == "LAB":
        return _apply(image, _lab()), ""
    found = _transform(profile, image.mode) if profile else _NOTHING
    if isinstance(found, _Transform):
        return _apply(image.convert(found.mode), found.lcms), CONVERTED
    return image.convert("RGB"), found


def changes(profile: bytes | None, mode: str) -> bool:
    """Whether `to_srgb` gives other pixels with the profile than without it."""
    return bool(profile) and isinstance(_transform(profile, mode), _Transform)


class _Transform:
    def __init__(self, mode: str, lcms: Any) -> None:
        self.mode = mode  # that it takes
        self.lcms = lcms


_NOTHING = ""  # the profile is sRGB
_known: OrderedDict[tuple[bytes, str], _Transform | str] = OrderedDict()
_lock = threading.Lock()


def _transform(profile: bytes, mode: str) -> _Transform | str:
    """What to do to pictures of that mode with that profile; worked out once."""
    if len(profile) > MAX_BYTES:
        return IGNORED
    key = (hashlib.sha256(profile).digest(), mode)
    with _lock:
        if key in _known:
            _known.move_to_end(key)
            return _known[key]
    try:
        found = _made(profile, mode)
    except Exception:  # ImageCms raises whatever LittleCMS makes of a file
        found = IGNORED
    with _lock:
        _known[key] = found
        if len(_known) > _REMEMBERED:
            _known.popitem(last=False)
    return found


def _made(profile: bytes, mode: str) -> _Transform | str:
    opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    own = _SPACES.get(opened.profile.xcolor_space.strip(), "")
    of_pictures = opened.profile.device_class in _PICTURES
    if not of_pictures or (own != mode and (own, mode) != ("RGB", "L")):
        return IGNORED
    transform = _Transform(own, _built(opened, own))
    probe = _probe(own)
    before = np.asarray(probe.convert("RGB")).astype(int)
    after = np.asarray(_apply(probe, transform.lcms)).astype(int)
    # White and black of a usable profile: one that turns everything dark says nothing.
    if after[0, 0].max() > 127 or after[-1, -1].min() < 128:
        return IGNORED
    same = own != "CMYK" and abs(after - before).max() <= NO_CHANGE
    return _NOTHING if same else transform


def _probe(mode: str) -> Image.Image:
    """Colours from all over a mode's space, the darkest first and the lightest last."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    if mode == "CMYK":
        return Image.frombytes("CMYK", (2, 1), b"\xff" * 4 + b"\0" * 4)
    steps = np.linspace(0, 255, 13).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1)
    return Image.fromarray(grid.reshape(13, 169, 3))


def _built(profile: Any, mode: str) -> Any:
    return ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _apply(image: Image.Image, transform: Any) -> Image.Image:
    return cast(Image.Image, ImageCms.applyTransform(image, transform))  # None is for in place


def _lab() -> Any:
    return _built(ImageCms.createProfile("LAB"), "LAB")

"""A captioner without weights: names a picture's dominant colours. For the demo and the tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from captioning.captioner import Answer, BadPicture, Caption, Captioner, Failure, Picture

#: Colour name -> sRGB anchors; a pixel takes the name of the nearest anchor.
ANCHORS: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("black", (0, 0, 0)),
    ("black", (45, 45, 45)),
    ("grey", (110, 110, 110)),
    ("grey", (180, 180, 180)),
    ("white", (255, 255, 255)),
    ("red", (210, 45, 40)),
    ("red", (236, 100, 90)),
    ("orange", (240, 130, 30)),
    ("orange", (250, 170, 70)),
    ("brown", (165, 115, 60)),
    ("brown", (106, 70, 47)),
    ("yellow", (252, 234, 43)),
    ("yellow", (250, 232, 96)),
    ("green", (90, 160, 60)),
    ("green", (118, 200, 110)),
    ("green", (177, 204, 51)),
    ("blue", (97, 178, 228)),
    ("blue", (30, 80, 170)),
    ("blue", (104, 168, 240)),
    ("purple", (188, 132, 224)),
    ("purple", (130, 80, 160)),
    ("pink", (255, 167, 192)),
    ("pink", (230, 122, 148)),
)

_NAMES = np.array([name for name, _ in ANCHORS])
_RGB = np.array([rgb for _, rgb in ANCHORS], dtype=np.float32)

SHARE = 0.05  # a colour is named if it covers at least this share of the picture
SIDE = 32  # pictures are counted at SIDE x SIDE pixels


@dataclass(frozen=True)
class NoSettings:
    """Nothing can be set."""


class ColourCaptioner(Captioner):
    """Writes "mostly blue, with green and black", one caption a picture. It has no settings."""

    Settings = NoSettings

    @property
    def revision(self) -> str:
        return "1"

    def caption(self, pictures: Iterable[Picture]) -> Iterator[Answer]:
        for picture in pictures:
            try:
                with self.spent("look"):
                    text = describe(picture.open())
            except BadPicture as error:
                yield picture.key, Failure(error.reason, str(error))
            else:
                yield picture.key, [Caption(text, self.name, self.revision)]

    def decisive(self) -> dict[str, Any]:
        return {}

    def label(self) -> str:
        return self.name


def describe(image: Image.Image) -> str:
    """The picture's dominant colour, then up to three others by falling share (ties by name)."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32).reshape(-1, 1, 3)
    nearest = ((pixels - _RGB) ** 2).sum(-1).argmin(1)
    names, counts = np.unique(_NAMES[nearest], return_counts=True)
    ranked = sorted(zip(-counts, names, strict=True))
    first, *others = [str(name) for count, name in ranked if -count >= SHARE * SIDE * SIDE]
    if not others:
        return f"all {first}"
    others = others[:3]
    listed = others[0] if len(others) == 1 else f"{', '.join(others[:-1])} and {others[-1]}"
    return f"mostly {first}, with {listed}"

"""Images to sentences. A leaf package, usable alone:

from captioning import load
captions = load("colour")(images)   # list[PIL.Image] -> list[Caption]
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Caption:
    """One sentence about one picture, and what wrote it."""

    text: str
    captioner: str  # name in CAPTIONERS
    revision: str  # changes when the captioner's output changes
    prompt: str = ""  # what the captioner was asked; "" for one that takes no prompt
    tokens: int | None = None
    finish_reason: str | None = None


class Captioner(Protocol):
    """A callable from pictures to captions, one each, in order."""

    name: str
    revision: str

    def __call__(self, images: Sequence[Image.Image]) -> list[Caption]: ...


#: Captioner name -> class ("module:attribute").
CAPTIONERS: dict[str, str] = {
    "colour": "captioning.colour:ColourCaptioner",
}


def load(name: str) -> Captioner:
    """The captioner of that name.

    Raises:
        KeyError: no captioner has this name; the message lists those that exist.
    """
    if name not in CAPTIONERS:
        raise KeyError(f"unknown captioner {name!r}; known: {', '.join(CAPTIONERS)}")
    return pkgutil.resolve_name(CAPTIONERS[name])()

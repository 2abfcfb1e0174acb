"""The data flow as types: InputShard -> ImageRef -> ImageSample -> latents, or a Reject."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InputShard:
    """The unit of work of every stage: about samples_per_shard pictures of one split.

    `spec` is what the source needs to enumerate the shard again (plain, picklable, small).
    """

    id: str  # "00000"; names every file made from this shard
    split: str  # "train", or a split that training does not stream ("heldout", "val")
    spec: tuple[Any, ...] = ()


@dataclass(frozen=True)
class ImageRef:
    """One picture before its bytes are fetched."""

    key: str  # unique in the source; 5 digits of shard + 4 of index (img2dataset's convention)
    url: str
    caption: str


@dataclass(frozen=True)
class ImageSample:
    """One picture with its encoded bytes, exactly as they will stand in the tar."""

    ref: ImageRef
    data: bytes
    extension: str  # "png", "jpg", "webp"
    width: int  # stored size, pixels
    height: int
    original_width: int
    original_height: int


@dataclass(frozen=True)
class Reject:
    """A sample that was left out, and why. Rejects are written, counted and shown."""

    key: str
    stage: str
    reason: str  # a short class of causes, e.g. "undecodable"; summaries group by it
    detail: str  # what exactly happened

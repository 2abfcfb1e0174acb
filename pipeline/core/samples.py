"""The data flow as types: InputShard -> RawImage -> ImageSample -> latents, or a Reject."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
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

    key: str  # unique in the source; see sample_key
    url: str
    caption: str  # the one that trains; "" where a captioner is to write it
    references: tuple[str, ...] = ()  # every caption, where a source keeps them (evaluation)


@dataclass(frozen=True)
class RawImage:
    """One picture's encoded bytes as they came, in whatever format; see pipeline.core.rules."""

    ref: ImageRef
    data: bytes


@dataclass(frozen=True)
class ImageSample:
    """One picture with its encoded bytes, exactly as they will stand in the tar."""

    ref: ImageRef
    data: bytes
    extension: str  # "png", "jpg", "webp"
    width: int  # stored size, pixels, upright
    height: int
    original_width: int  # as it came, upright
    original_height: int
    profile: str = ""  # what became of its colour profile: pipeline.core.colour's counters

    @cached_property
    def sha256(self) -> str:
        """Of the bytes; duplicates are told by it, and the parquet has it."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Reject:
    """A sample that was left out, and why. Rejects are written, counted and shown."""

    key: str
    stage: str
    reason: str  # a short class of causes, e.g. "undecodable"; summaries group by it
    detail: str  # what exactly happened
    #: Where it came from, for those who look for it in their list; no part of the verdict.
    ref: ImageRef | None = field(default=None, compare=False)
    #: Known beforehand, by its name: it tells of no outage, so `max_reject_rate` leaves it out.
    foreseen: bool = field(default=False, compare=False)


FAILED = "failed_to_download"  # the reason of rejects that `--retry-failed` tries again


def sample_key(shard: str, index: int, digits: int = 4) -> str:
    """img2dataset's key: "00017" and 42 are "000170042".

    Args:
        digits: of the index, the same for every shard of a source; 5 where one may hold more than
            10,000 samples.

    Raises:
        ValueError: the index has more digits: keys would no longer sort, nor be unique.
    """
    if index >= 10**digits:
        raise ValueError(f"shard {shard}: sample {index} does not fit into {digits} digits")
    return f"{shard}{index:0{digits}d}"

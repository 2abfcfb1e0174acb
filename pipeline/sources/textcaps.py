"""TextCaps: 25,119 photographs with text in them, five captions each by people.

HuggingFaceM4/TextCaps holds a loading script; its pictures are in the branch that the hub has
converted to parquet. No size filter and no shrinking, as the paper's data had it.
"""

from __future__ import annotations

from typing import ClassVar

from pipeline.core.location import Location
from pipeline.core.rules import Rules
from pipeline.sources.hf import CONVERTED, HubDataset


class TextCaps(HubDataset):
    """Settings of the source: those of `hf`, with its columns."""

    rules: ClassVar[Rules] = Rules(image_size=None, min_image_size=0)

    repo: Location = f"HuggingFaceM4/TextCaps@{CONVERTED}"
    splits: str = "train,validation=train"  # the paper trains on both
    caption_col: str = "reference_strs"

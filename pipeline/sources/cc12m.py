"""CC12M: about 11 million pictures of the web with their alt text, as WebDataset tars on the hub.

Captions are cleaned (pipeline.core.rules): alt text is written for machines as often as for people.
"""

from __future__ import annotations

from typing import ClassVar

from pipeline.core.rules import Rules
from pipeline.sources.webdataset import WebDataset


class CC12M(WebDataset):
    """Settings of the source."""

    rules: ClassVar[Rules] = Rules(clean_captions=True)

    base: str = "hf://datasets/pixparse/cc12m-wds"
    tars: str = "cc12m-train-{0000..2175}.tar"
    samples_per_tar: int = 5_040  # 10,968,539 in 2,176

"""cifar-captions: links of COYO-700M whose alt text names one of the ten classes of CIFAR-10.

The set of the paper's small experiments. COYO-700M (kakaobrain/coyo-700m, CC BY 4.0) is 747 million
links in 128 parquet files; its columns tell the size of each picture, so that none is asked for
that the size rule would leave out. How the paper chose rows is not published beyond "the ten
classes"; here a class counts where its name or its plural stands as a word of its own.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator, Field

from pipeline.core.location import Location
from pipeline.sources.tables.url_table import UrlList
from pipeline.sources.urls import Urls
from pipeline.sources.web.settings import listed

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


class CifarCaptions(Urls):
    """Settings beyond those of `urls`."""

    url_list: Annotated[Location, Field(min_length=1)] = "hf://datasets/kakaobrain/coyo-700m/data"
    caption_col: Annotated[str, Field(min_length=1)] = "text"  # pyright: ignore

    #: Words, or phrases, of which one must stand in the text; "car" and "plane" are not among them.
    classes: Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)] = CLASSES
    #: Of the picture as COYO saw it, pixels on the shorter side; 0 looks at no size.
    min_listed_size: Annotated[int, Field(ge=0)] = 256

    def _list(self) -> UrlList:
        sizes = ("width", "height") if self.min_listed_size else ()
        return replace(
            super()._list(),
            more=sizes,
            choose=self._chosen,
            choice=["cifar-captions 1", list(self.classes), self.min_listed_size],
        )

    def _chosen(self, table: pa.Table) -> pa.Array:
        keep: Any = pc.match_substring_regex(table["caption"], pattern(self.classes))  # pyright: ignore
        if self.min_listed_size:
            # A size that the list does not tell is judged when the picture is there.
            sizes = [table[name].cast(pa.float64()) for name in ("width", "height")]
            shorter = pc.min_element_wise(*sizes, float(self.min_listed_size))  # pyright: ignore
            keep = pc.and_(keep, pc.equal(shorter, float(self.min_listed_size)))  # pyright: ignore
        return keep


def pattern(classes: tuple[str, ...]) -> str:
    """A regular expression (RE2) for the names and their plurals, as whole words in any case."""
    names = "|".join(f"{re.escape(name)}|{re.escape(plural(name))}" for name in classes)
    return rf"(?i)(?:^|[^\pL\pN_])(?:{names})(?:$|[^\pL\pN_])"


def plural(name: str) -> str:
    if name.endswith(("s", "x", "z", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"

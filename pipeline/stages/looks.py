"""What the stored pictures and captions of earlier versions hold that this version makes otherwise
(pipeline.core.mends): told from headers, and by decoding only what looks empty."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from pipeline.core import layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import Commit, read_file
from pipeline.core.images import BadPicture, once_misread, read_pixels
from pipeline.core.mends import ANSWERS, COLOURS, METADATA, PIXELS
from pipeline.core.metadata import without
from pipeline.core.samples import ImageSample
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.stages.caption_text import no_caption
from pipeline.stages.images import stored_samples

#: Names of files that the first version may have made white or black of.
_DEEP = (".tif", ".tiff", ".bmp", ".dib", ".pfm")
_EMPTY = 0.98  # share of values that are all white or nearly black
_DARK, _LIGHT = 16, 250

Findings = Callable[[list[str]], dict[str, set[str]]]
Raw = Callable[[Commit], set[str]]  # a shard -> keys of pictures whose source was misread


def findings(catalog: Catalog, group: str, raw: Raw | None = None) -> Findings:
    """What concerns the old shards of a group: of its own files, and of the pictures it shows.

    Args:
        raw: of pictures, where the source's own files are at hand.
    """
    source, kind = group.split("/")[:2]
    pictures = layout.images_group(source)

    def images(shards: list[str], wanted: set[str]) -> dict[str, set[str]]:
        look = functools.partial(_images, catalog.store, pictures, raw)
        found = catalog.looked(pictures, shards, look)
        return {shard: kinds & wanted for shard, kinds in found.items()}

    def find(shards: list[str]) -> dict[str, set[str]]:
        if kind == "images":
            return images(shards, {PIXELS, METADATA})
        if kind == "latents":
            return images(shards, {COLOURS})
        if kind != "captions":
            return {}
        seen = images(shards, {COLOURS})
        texts = catalog.looked(group, shards, functools.partial(_captions, catalog.store, group))
        return {s: seen.get(s, set()) | texts.get(s, set()) for s in shards}

    return find


def as_it_came(sample: ImageSample) -> bool:
    """Whether a stored picture may be the file that came: what is shrunk is not."""
    return (sample.width, sample.height) == (sample.original_width, sample.original_height)


def misread(sample: ImageSample) -> bool:
    """Whether a stored picture shows nothing, as the first version made of some TIFF and BMP."""
    named = sample.ref.url.lower().split("?")[0].endswith(_DEEP)
    pixels = sample.width * sample.height
    if not named and (sample.extension != "png" or not _plain(sample.data)):
        return False
    if len(sample.data) > 2 * pixels:
        return False  # it shows something
    try:
        levels = read_pixels(sample.data)
    except BadPicture:
        return False
    return bool(max(np.mean(levels <= _DARK), np.mean(levels >= _LIGHT)) > _EMPTY)


def _plain(png: bytes) -> bool:
    """Whether a PNG is one that this package writes: 8-bit RGB without any chunk but pixels."""
    return png[24:26] == b"\x08\x02" and png[37:41] == b"IDAT"


def _images(store: Store, group: str, raw: Raw | None, commit: Commit) -> set[str]:
    """Kinds of what is in a shard; its tar is read only where pictures may be as they came."""
    table = from_parquet(read_file(store, group, commit, ".parquet"))
    names = ["status", "width", "height", "original_width", "original_height", "url"]
    rows = [r for r in table.select(names).to_pylist() if r["status"] == "success"]
    shrunk = [
        (r["width"], r["height"]) != (r["original_width"], r["original_height"]) for r in rows
    ]
    named = [(row["url"] or "").lower().split("?")[0].endswith(_DEEP) for row in rows]
    found = {PIXELS} if raw is not None and raw(commit) else set()
    if all(shrunk) and not any(named):
        return found  # JPEGs of our own making, of pictures that had no odd depth
    for sample in stored_samples(store, group, commit):
        if as_it_came(sample):
            if once_misread(sample.data):
                found.add(COLOURS)
            if METADATA not in found and without(sample.data) != sample.data:
                found.add(METADATA)
        if PIXELS not in found and misread(sample):
            found.add(PIXELS)
    return found


def _captions(store: Store, group: str, commit: Commit) -> set[str]:
    table = from_parquet(read_file(store, group, commit, ".parquet"))
    # The source's words have their own cleaning; a captioner's are one line each.
    texts = table["caption"].to_pylist()
    return {ANSWERS} if any(text and no_caption(text) for text in texts) else set()

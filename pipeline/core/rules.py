"""Which fetched pictures are kept and in what form: once, for every source.

Bytes that came as JPEG, PNG or WebP are stored where the rules do not shrink them: pixels and
colour profile as they came, without metadata. What is shrunk becomes a JPEG of quality 95 in sRGB;
what WebDataset's readers would not know, or holds several frames, becomes a PNG of the pixels that
an encoder sees.
"""

from __future__ import annotations

import io
import unicodedata
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.core import metadata, urls
from pipeline.core.errors import BadPicture
from pipeline.core.images import Header, orientation, read, read_header, resize
from pipeline.core.samples import ImageSample, RawImage, Reject

#: Pillow's format -> extension of bytes that are stored as they came.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class Rules(BaseModel):
    """What every picture has to meet; names are img2dataset's. All of them decide bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Pictures whose shorter side is larger are shrunk to it, pixels; None shrinks none.
    image_size: Annotated[int, Field(ge=8)] | None = 512
    min_image_size: Annotated[int, Field(ge=0)] = 256  # of the shorter side as it came, pixels
    max_image_area: Annotated[int, Field(ge=1)] | None = None  # as it came, pixels
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = None  # longer side by shorter
    encode_quality: Annotated[int, Field(ge=1, le=100)] = 95  # of JPEGs that shrinking makes
    clean_captions: bool = False  # by captioning.clean: for alt text from the web
    max_caption_length: Annotated[int, Field(ge=1)] = 10_000  # characters
    #: Of pictures kept as they came: EXIF with its place and time, XMP, IPTC, comments, thumbnails.
    metadata: Literal["strip", "keep"] = "strip"
    drop_duplicates: bool = True  # exact ones within a shard: the lowest key is kept

    @field_validator("image_size", mode="before")
    @classmethod
    def _no_shrinking(cls, value: object) -> object:
        return None if value == "none" else value


def keep(raw: RawImage, rules: Rules) -> ImageSample | Reject:
    """The picture as it is to be stored, or why it is not.

    Sizes are judged by the header, before a pixel is decoded. Every picture is decoded once, so
    that one that breaks off is found here and not days later.

    Returns:
        A sample; or a reject "too-small", "too-large", "aspect-ratio", "undecodable", "no-caption"
        (control characters alone) or "caption-too-long".
    """
    caption = readable(raw.ref.caption)
    references = tuple(map(readable, raw.ref.references))
    if (longest := max(map(len, (caption, *references)))) > rules.max_caption_length:
        detail = f"a caption of {longest} characters"
        return Reject(raw.ref.key, "download", "caption-too-long", detail, raw.ref)
    if raw.ref.caption and not caption:
        detail = f"nothing can be read of {raw.ref.caption[:80]!r}"
        return Reject(raw.ref.key, "download", "no-caption", detail, raw.ref)
    try:
        raw = replace(raw, ref=replace(raw.ref, caption=caption, references=references))
        return _kept(raw, rules)
    except BadPicture as error:
        return Reject(raw.ref.key, "download", error.reason, str(error), raw.ref)


def readable(caption: str) -> str:
    """Without control characters and half surrogate pairs, which no parquet or tokenizer takes;
    white space at the ends goes, and runs of it are one space. "" where nothing can be seen."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in caption)
    return " ".join(text.split()) if urls.stripped(text) else ""


def _kept(raw: RawImage, rules: Rules) -> ImageSample:
    header = read_header(raw.data)
    _judge(header, rules)
    pixels, profile = read(raw.data)
    height, width, _ = pixels.shape  # upright, which a PNG's header does not always tell
    if rules.image_size is not None and header.shorter > rules.image_size:
        scale = rules.image_size / header.shorter
        new = [max(rules.image_size, round(side * scale)) for side in (width, height)]
        pixels = resize(pixels, new[1], new[0])
        # Full chroma: a small picture has none to spare. By Pillow: up to quality 95 simplejpeg
        # takes libjpeg-turbo's fast DCT, which makes larger files of less exact pictures.
        buffer = io.BytesIO()
        picture = Image.fromarray(pixels)
        picture.save(buffer, "JPEG", quality=rules.encode_quality, subsampling=0)
        data = buffer.getvalue()
        return ImageSample(raw.ref, data, "jpg", new[0], new[1], width, height, profile)
    extension = KEPT.get(header.format)
    data = None if extension is None or header.animated else raw.data
    if data is not None and rules.metadata == "strip":
        data = stripped(data)
    if extension is None or data is None:
        extension, data = "png", _png(pixels)
    return ImageSample(raw.ref, data, extension, width, height, width, height, profile)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def without_metadata(sample: ImageSample) -> ImageSample:
    """A stored picture as `keep` would have stored it under `metadata: strip`."""
    data = stripped(sample.data)
    if data is None:
        return replace(sample, data=_png(read(sample.data).pixels), extension="png")
    return sample if data == sample.data else replace(sample, data=data)


def stripped(data: bytes) -> bytes | None:
    """A picture kept as it came without its metadata; the same pixels, the same way up.

    Returns:
        None for one that is so odd that only its pixels can be kept.

    Raises:
        BadPicture: "undecodable" or "too-large".
    """
    plain = metadata.without(data)
    if plain is None or plain == data:
        return plain
    turn = orientation(data)  # may decode a PNG: asked only where there is metadata
    return plain if turn == 1 else metadata.without(data, turn)


def _judge(header: Header, rules: Rules) -> None:
    width, height = header.width, header.height
    shorter, longer = sorted((width, height))
    if shorter < rules.min_image_size:
        raise BadPicture(
            "too-small", f"{width}x{height}, needs {rules.min_image_size} on the shorter side"
        )
    if rules.max_image_area is not None and width * height > rules.max_image_area:
        raise BadPicture("too-large", f"{width}x{height} is over {rules.max_image_area} pixels")
    if rules.max_aspect_ratio is not None and longer > rules.max_aspect_ratio * shorter:
        raise BadPicture("aspect-ratio", f"{width}x{height} is over {rules.max_aspect_ratio}:1")

"""The metadata of a column group: what made it, and whether it is what a reader asks for."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict

from pipeline.core.commits import reason, remedy, require_schema
from pipeline.core.errors import SettingError
from pipeline.core.store import Store

SCHEMA = 1


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VaeFacts(Strict):
    """What training and decoding have to know of an image autoencoder."""

    name: str
    repo: str  # hub id or folder
    revision: str = ""
    weights_sha256: str = ""  # "" in the static table, where no weights were read
    dtype: str = "float32"  # of the encoder when it ran
    channels: int
    downsample: int
    scale: float  # model latent = (raw latent - shift) * scale
    shift: float


class TextFacts(Strict):
    """What training and sampling have to know of a text encoder."""

    name: str
    repo: str
    revision: str = ""
    weights_sha256: str = ""
    dtype: str = "float32"
    width: int  # of a token vector
    length: int  # tokens, padding included


class LatentsManifest(Strict):
    schema_version: int = SCHEMA
    kind: str = "latents"
    source: str
    vae: VaeFacts
    resolution: int  # side of the encoded picture, pixels
    crop: str  # "center", or "random": drawn by (seed, key)
    latents: str  # raw, before shift and scale: the posterior's "mean", a "sample" of it drawn by
    # (seed, key), or its "moments": mean and log variance, (2 channels, side, side)
    small: str = "reject"  # or "upscale": what became of pictures below the resolution
    dtype: str  # of the stored array
    samples: int = 0
    splits: dict[str, int] = {}
    shards: int = 0

    def shape(self) -> tuple[int, int, int]:
        """Of a stored array: (channels, side, side), moments twice as deep."""
        side = self.resolution // self.vae.downsample
        return self.vae.channels * (2 if self.latents == "moments" else 1), side, side


class TextManifest(Strict):
    schema_version: int = SCHEMA
    kind: str = "text"
    source: str
    text_encoder: TextFacts
    text: str  # "full" or "trimmed"
    captions: str  # the mix, e.g. "alt:0.9,colour:0.1"
    dtype: str  # of the stored token vectors (tokens, width): float16, or int8 with scales
    samples: int = 0  # pictures, not distinct captions
    splits: dict[str, int] = {}
    shards: int = 0


class OfficialManifest(Strict):
    """Of an export in the official code's layout; `pipeline.official.layout` has its columns."""

    schema_version: int = SCHEMA
    kind: str = "official"
    source: str
    vae: VaeFacts  # latents are scaled with its scale already, and never shifted
    text_encoder: TextFacts  # all rows of its length
    resolutions: list[int]  # sides of the encoded pictures, pixels: columns latents_<side>
    crop: str
    latents: str  # the posterior's "mean" or a "sample" of it
    captions: str
    dtype: str = "float16"
    samples: int = 0
    splits: dict[str, int] = {}
    shards: int = 0


Manifest = LatentsManifest | TextManifest | OfficialManifest


def write_manifest(store: Store, group: str, manifest: Manifest) -> None:
    store.write_json(f"{group}/manifest.json", manifest.model_dump())


def read_manifest(store: Store, group: str) -> Manifest:
    """The group's manifest.

    Raises:
        FileNotFoundError: there is none (nothing was committed there).
        NewerSchema: it was written by a newer version of this package.
        SettingError: it is damaged, or of another kind.
    """
    path = f"{group}/manifest.json"
    data = store.read(path)
    require_schema(store, path, data, "schema_version", SCHEMA)
    kinds: dict[str, type[Manifest]] = {
        "latents": LatentsManifest,
        "text": TextManifest,
        "official": OfficialManifest,
    }
    try:
        record = json.loads(data)
        if not isinstance(record, dict) or record.get("kind") not in kinds:
            raise ValueError(f"its kind is none of {', '.join(kinds)}")
        return kinds[record["kind"]].model_validate(record)
    except (ValueError, TypeError) as error:
        what = f"is no manifest ({reason(error)})"
        raise SettingError(f"{store.url(path)} {what}; {remedy(store, path)}") from error


def mismatches(expected: BaseModel, found: BaseModel, ignore: tuple[str, ...] = ()) -> list[str]:
    """ "field: expected X, found Y" for every field in which two records of facts differ.

    An empty text is no fact: a group that was imported does not know the weights that made it.
    """
    a, b = expected.model_dump(), found.model_dump()
    return [
        f"{key}: expected {a[key]}, found {b.get(key)}"
        for key in a
        if key not in ignore and a[key] != b.get(key) and "" not in (a[key], b.get(key))
    ]

"""Small column groups on disk, made with the pipeline's own writers; no encoder runs."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core import layout
from pipeline.core.commits import write_shard
from pipeline.core.groups import publish
from pipeline.core.manifest import TextFacts, VaeFacts
from pipeline.core.mds import encode_shard, stored
from pipeline.core.mix import Mix
from pipeline.core.published import read_index
from pipeline.core.samples import InputShard, Reject
from pipeline.core.store import Store, fingerprint
from pipeline.core.tables import to_parquet
from pipeline.core.tokens import quantise
from pipeline.encoders import find_text, find_vae, text_facts, vae_facts
from training.data.cache import Cache
from training.data.shard_files import ShardFiles
from training.data.token_vectors import TextGroup

SPLITS = ("train", "train", "heldout")  # of input shards 00000, 00001, 00002


@dataclass(frozen=True)
class Encoders:
    """Names of a VAE and a text encoder."""

    vae: str
    text: str

    def facts(self) -> tuple[VaeFacts, TextFacts]:
        """With the weights' hashes where there are weights."""
        if self == SHIPPED:
            return find_vae(self.vae)[0], find_text(self.text)[0]
        return vae_facts(self.vae), text_facts(self.text)


SHIPPED = Encoders("tiny4", "tiny-clip")


def make_encoders(folder: Path, width: int = 16, length: int = 12) -> Encoders:
    """Folders with the encoders' config files, but no weights."""
    vae, text = folder / "vae", folder / "text"
    vae.mkdir(parents=True)
    text.mkdir()
    config: dict[str, Any] = {
        "latent_channels": 4,
        "block_out_channels": [8, 8, 8, 8],
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    (vae / "config.json").write_text(json.dumps(config))
    config = {"model_cfg": {"text_cfg": {"width": width, "context_length": length}}}
    (text / "open_clip_config.json").write_text(json.dumps(config))
    return Encoders(str(vae), str(text))


def make_source(
    root: Path | str,
    encoders: Encoders,
    name: str = "toy",
    resolution: int = 64,
    text: str = "trimmed",
    captions: str = "alt",
    samples: int = 20,
    splits: tuple[str, ...] = SPLITS,
    without_caption: tuple[str, ...] = (),
    refused: tuple[str, ...] = (),
    seed: int = 0,
    compression: str | None = None,
    latents: str = "mean",
    crop: str = "center",
    text_dtype: str = "float16",
) -> Store:
    """Latents and text groups of one source with `samples` pictures in each input shard.

    The caption of key K is "caption C of SHARD" with C its number modulo 7, so captions are shared;
    the first value of every token row is C, and the first latent value is K's number. Moments are
    the same means, with -2 for every log variance. With `text_dtype` int8 the
    same token rows are stored, quantised.
    """
    store = Store(root)
    vae, encoder = encoders.facts()
    latents_group = layout.latents_group(name, encoders.vae, resolution, latents, crop)
    text_group = layout.text_group(name, encoders.text, captions, text, text_dtype)
    side = resolution // vae.downsample
    depth = vae.channels * (2 if latents == "moments" else 1)
    latents_inputs = {
        **{"vae": vae.model_dump(), "resolution": resolution, "crop": crop, "latents": latents},
        **{"small": "reject", "dtype": "float16"},
    }
    text_inputs = {
        **{"text_encoder": encoder.model_dump(), "text": text, "dtype": text_dtype},
        "captions": Mix.parse(captions).weights,
    }
    latent_columns = {"key": "str", "latent": f"ndarray:float16:{depth},{side},{side}"}
    for number, split in enumerate(splits):
        shard = InputShard(f"{number:05d}", split)
        rng = np.random.default_rng((seed, number))
        keys = [f"{shard.id}{i:04d}" for i in range(samples)]
        pictures = rng.normal(0.25, 2, (samples, vae.channels, side, side)).astype(np.float16)
        pictures[:, 0, 0, 0] = np.arange(samples)
        if latents == "moments":
            pictures = np.concatenate([pictures, np.full_like(pictures, -2)], axis=1)
        rows = [{"key": key, "latent": latent} for key, latent in zip(keys, pictures, strict=True)]
        own = pa.table({"key": keys, "row": pa.array(range(samples), pa.int32())})
        parquet = {".parquet": to_parquet(own)}
        made = (store, latents_group, shard, latents_inputs)
        _write(*made, latent_columns, rows, keys, [], parquet, compression)
        tokens = [_tokens(c, encoder, text, rng) for c in range(7)]
        rows = [
            {"caption": f"caption {c} of {shard.id}", **_stored(tokens[c], text_dtype)}
            for c in range(7)
        ]
        with_caption = [key for key in keys if key not in {*without_caption, *refused}]
        rejects = [Reject(k, "encode", "no-caption", "none") for k in keys if k in refused]
        numbers = [int(key[5:]) % 7 for key in with_caption]
        join = pa.table({"key": with_caption, "row": pa.array(numbers, pa.int32())})
        columns = {"caption": "str", "tokens": f"ndarray:{text_dtype}"}
        if text_dtype == "int8":
            columns["scales"] = "ndarray:float16"
        parquet = {".parquet": to_parquet(join)}
        made = (store, text_group, shard, text_inputs)
        rows = rows if with_caption else []
        _write(*made, columns, rows, with_caption, rejects, parquet, compression)
    publish(store, latents_group)
    publish(store, text_group)
    return store


def settings(root: Path, encoders: Encoders, folder: Path) -> dict[str, Any]:
    """A run of two short stages over `make_source`, as a YAML file would hold it."""
    return {
        "name": "toy",
        "folder": str(folder),
        "seed": 3,
        "data": {
            "root": str(root),
            "sources": ["toy"],
            "vae": encoders.vae,
            "text_encoder": encoders.text,
            "text": "trimmed",
            "workers": 0,
        },
        "model": {
            "arch": "custom",
            "width": 32,
            "depth": 2,
            "head_dim": 16,
            "multiple_of": 16,
            "mixer_width": 32,
            "mixer_depth": 1,
            "num_experts": 2,
        },
        "defaults": {"resolution": 64, "batch_size": 8, "lr": 1e-2, "ema": 0.9, "save_every": 4},
        "stages": {
            "masked": {"steps": 10, "mask": "deferred", "mask_ratio": 0.5, "warmup": 3},
            "full": {"steps": 7, "schedule": "cosine", "clip": 0.5, "keep_moments": True},
        },
    }


def open_text(root: Path, group: str) -> TextGroup:
    """A text group as the trainer reads it."""
    store = Store(root)
    files = ShardFiles(store, group, read_index(store, group), Cache(root / "cache"))
    return TextGroup(files, "`make it`")


def changed(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the settings with one dotted key set."""
    result = copy.deepcopy(raw)
    *path, last = key.split(".")
    section = result
    for part in path:
        section = section.setdefault(part, {})
    section[last] = value
    return result


def _stored(tokens: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    if dtype == "float16":
        return {"tokens": tokens}
    values, scales = quantise(tokens)
    return {"tokens": values, "scales": scales}


def _tokens(c: int, encoder: TextFacts, text: str, rng: np.random.Generator) -> np.ndarray:
    rows = encoder.length if text == "full" else 3 + c
    tokens = rng.normal(size=(rows, encoder.width)).astype(np.float16)
    tokens[:, 0] = c
    return tokens


def _write(
    store: Store,
    group: str,
    shard: InputShard,
    inputs: dict[str, Any],
    columns: dict[str, str],
    rows: list[dict[str, Any]],
    keys: list[str],
    rejects: list[Reject],
    companions: dict[str, bytes],
    compression: str | None,
) -> None:
    inputs = {**inputs, "shard": shard.id}
    stem = f"{shard.id}-{fingerprint(inputs)}"
    files = {stem + end: value for end, value in companions.items()}
    entry = None
    if rows:
        data, entry = encode_shard(columns, rows, f"{stem}.mds", compression=compression)
        files[stored(entry)["basename"]] = data
    write_shard(store, group, shard, inputs, files, keys, rejects, entry, max_reject_rate=1.0)

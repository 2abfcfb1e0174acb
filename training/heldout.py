"""Pictures that training never sees, in a fixed order: for evaluation and samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import drops
from pipeline.core.latents import posterior_sample
from pipeline.core.mds import decode_shard, stored, unpack
from pipeline.core.store import Store
from training.preflight import Plan, Source
from training.takedown import dropped_rows
from training.text import Caption, TextGroup


@dataclass(frozen=True)
class Picture:
    """One held-out picture and its caption."""

    source: str
    key: str
    latent: np.ndarray  # (C, h, w), raw: float16 as encoded, or float32 drawn from moments
    caption: Caption


@dataclass(frozen=True)
class _Shard:
    """Which rows are wanted of one input shard of a source."""

    source: Source
    entry: dict[str, Any]
    input: str
    rows: list[int]


def count(plan: Plan, stage: str, split: str, wanted: int) -> int:
    """How many pictures `read` has: `wanted`, or fewer where the split is smaller."""
    return sum(len(shard.rows) for shard in _find(plan, stage, split, wanted))


def read(
    plan: Plan, stage: str, split: str, wanted: int, first: int = 0, step: int = 1
) -> list[Picture]:
    """The first `wanted` pictures of a split, in the order of their shards.

    Each source of the stage has its share of an epoch. Of the pictures found, number `first`,
    `first + step`, … are read. What was dropped is not among them.

    Raises:
        SettingError: a picture has no caption in its text group.
    """
    store = Store(plan.config.data.root)
    cache = Path(plan.config.data.cache or plan.config.run_folder() / "cache").absolute()
    pictures: list[Picture] = []
    number = 0
    for shard in _find(plan, stage, split, wanted):
        mine = [row for n, row in enumerate(shard.rows, number) if (n - first) % step == 0]
        number += len(shard.rows)
        if mine:
            command = shard.source.command(plan.config)
            text = TextGroup(store, shard.source.text_group, cache, command)
            pictures += _read_shard(store, plan.config.seed, shard, mine, text)
    return pictures


def _find(plan: Plan, stage: str, split: str, wanted: int) -> Iterator[_Shard]:
    store = Store(plan.config.data.root)
    for source, share in zip(plan.data[stage], plan.shares(stage), strict=True):
        left = max(1, round(wanted * share))
        index = store.read_json(f"{source.latents_group}/index.json")
        pairs = zip(index["shards"], index["inputs"], strict=True)
        of_split = [(entry, record) for entry, record in pairs if record["split"] == split]
        gone = dropped_rows(
            store,
            source.latents_group,
            [record for _, record in of_split],
            drops.read(store, source.name),
            source.command(plan.config),
        )
        for entry, record in of_split:
            out = set(gone.get(record["shard"], ()))
            kept = (row for row in range(entry["samples"]) if row not in out)
            rows = list(itertools.islice(kept, left))
            left -= len(rows)
            if rows:
                yield _Shard(source, entry, record["shard"], rows)


def _read_shard(
    store: Store, seed: int, shard: _Shard, rows: list[int], text: TextGroup
) -> Iterator[Picture]:
    source, entry = shard.source, shard.entry
    data = unpack(store.read(f"{source.latents_group}/{stored(entry)['basename']}"), entry)
    _, samples = decode_shard(data)
    wanted = set(rows)
    for row, sample in enumerate(samples):
        if row in wanted:
            key, latent = sample["key"], np.array(sample["latent"])  # not a view of the whole shard
            if source.latents.latents == "moments":
                latent = posterior_sample(latent, "evaluate", seed, source.name, key)
            yield Picture(source.name, key, latent, text.read(shard.input, key))

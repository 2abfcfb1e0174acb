"""Pictures that training never sees, in a fixed order: for evaluation and samples."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.core.errors import BrokenShard
from pipeline.core.latents import posterior_sample
from pipeline.core.published import Commits, Row, read_index, read_samples
from pipeline.core.store import Store
from training.config.plan import TrainingPlan, TrainingSource
from training.data.cache import open_cache
from training.data.left_out import left_out
from training.data.shard_files import ShardFiles
from training.data.token_vectors import Caption, TextGroup


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

    source: TrainingSource
    row: Row
    rows: list[int]


def count(plan: TrainingPlan, stage: str, split: str, wanted: int) -> int:
    """How many pictures `read` has: `wanted`, or fewer where the split is smaller."""
    return sum(len(shard.rows) for shard in _find(plan, stage, split, wanted))


def read(
    plan: TrainingPlan, stage: str, split: str, wanted: int, first: int = 0, step: int = 1
) -> list[Picture]:
    """The first `wanted` pictures of a split, in the order of their shards.

    Each source of the stage has its share of an epoch. Of the pictures found, number `first`,
    `first + step`, … are read. What training leaves out is not among them.

    Raises:
        SettingError: a picture has no caption in its text group.
        BrokenShard: a shard is gone or damaged.
    """
    store = Store(plan.config.data.root)
    opened: dict[str, TextGroup] = {}
    pictures: list[Picture] = []
    number = 0
    for shard in _find(plan, stage, split, wanted):
        mine = [row for n, row in enumerate(shard.rows, number) if (n - first) % step == 0]
        number += len(shard.rows)
        if mine:
            text = opened.get(shard.source.name) or _captions(plan, store, shard.source)
            opened[shard.source.name] = text
            pictures += _read_shard(store, plan.config.seed, shard, mine, text)
    return pictures


def _captions(plan: TrainingPlan, store: Store, source: TrainingSource) -> TextGroup:
    rows = read_index(store, source.text_group)
    hashes = plan.config.data.check_hashes
    files = ShardFiles(store, source.text_group, rows, open_cache(plan), hashes)
    return TextGroup(files, source.command(plan.config))


def _find(plan: TrainingPlan, stage: str, split: str, wanted: int) -> Iterator[_Shard]:
    store = Store(plan.config.data.root)
    for source, share in zip(plan.data[stage], plan.shares(stage), strict=True):
        left = max(1, round(wanted * share))
        rows = [r for r in read_index(store, source.latents_group) if r[1]["split"] == split]
        command = source.command(plan.config)
        gone = left_out(store, source.name, source.latents_group, source.text_group, rows, command)
        text = _captions(plan, store, source) if plan.config.data.skip_damaged else None
        for entry, record in rows:
            out = set(gone.rows.get(record["shard"], ()))
            kept = (row for row in range(entry["samples"]) if row not in out)
            found = _Shard(source, (entry, record), list(itertools.islice(kept, left)))
            if found.rows and (text is None or _is_sound(store, found, text)):
                left -= len(found.rows)
                yield found


def _is_sound(store: Store, shard: _Shard, text: TextGroup) -> bool:
    """Whether what is wanted of a shard can be read: every rank looks, and leaves out the same."""
    try:
        for _ in _read_shard(store, 0, shard, shard.rows, text):
            pass
    except BrokenShard as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train: a held-out shard is left out: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _read_shard(
    store: Store, seed: int, shard: _Shard, rows: list[int], text: TextGroup
) -> Iterator[Picture]:
    source, wanted = shard.source, set(rows)
    commits = Commits(store, source.latents_group)
    for row, sample in enumerate(read_samples(store, source.latents_group, commits, shard.row)):
        if row in wanted:
            key, latent = sample["key"], np.array(sample["latent"])  # not a view of the whole shard
            if source.latents.latents == "moments":
                latent = posterior_sample(latent, "evaluate", seed, source.name, key)
            caption = text.read(shard.row[1]["shard"], key)
            yield Picture(source.name, key, latent, caption)

"""Shards of a latents group, as StreamingDataset takes them: one split, mapped, without drops."""

from __future__ import annotations

import bisect
import functools
import json
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from streaming import Stream
from streaming.base.format.mds import MDSReader

from pipeline.core.store import Store
from training.preflight import Source
from training.takedown import dropped_rows
from training.text import TextGroup

OPEN_SHARDS = 1024  # in each loader process; the kernel allows 65,530 maps


class SplitStream(Stream):
    """The shards of one split of a latents group; the index says which they are.

    Args:
        text: the captions of the same source.
        dropped: input shard -> keys of samples that are not to be streamed.
        command: what makes the group, for error messages.
        weight: its share of an epoch, relative to the other streams'; None for its size.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        split: str,
        cache: Path,
        text: TextGroup,
        dropped: dict[str, frozenset[str]],
        command: str,
        weight: float | None = None,
    ) -> None:
        url = store.url(source.latents_group)
        if store.local and not source.packed:
            super().__init__(local=url, proportion=weight)
        else:
            super().__init__(remote=url, local=str(cache / source.latents_group), proportion=weight)
        self.source = source
        self.wanted_split = split
        self.text = text
        self.dropped = dropped
        self.command = command
        self._store, self._group = store, source.latents_group

    def get_shards(self, world, allow_unsafe_types: bool):
        """Readers of the wanted shards only: the others do not exist for the dataset."""
        super().get_shards(world, allow_unsafe_types)  # fetches a remote index, checks the types
        with open(os.path.join(self.local, "index.json"), encoding="utf-8") as file:
            index = json.load(file)
        pairs = zip(index["shards"], index["inputs"], strict=True)
        wanted = [(shard, r) for shard, r in pairs if r["split"] == self.wanted_split]
        records = [record for _, record in wanted]
        gone = dropped_rows(self._store, self._group, records, self.dropped, self.command)
        readers = []
        for shard, record in wanted:
            reader = MappedReader.from_json(self.local, "", shard)
            reader.stream, reader.input = self, record["shard"]
            reader.leave_out(gone.get(record["shard"], []))
            if reader.samples:
                readers.append(reader)
        return readers


class MappedReader(MDSReader):
    """Maps its file; the library opens it for every sample, which takes longer than reading."""

    stream: SplitStream
    input: str  # the input shard
    skips: Sequence[int] = ()

    def leave_out(self, rows: list[int]) -> None:
        """These rows, in ascending order, do not exist for the dataset."""
        self.samples -= len(rows)
        # How many kept rows come before each. Kept row number i is row i plus the dropped ones
        # before it: those that have no more than i kept rows before them.
        self.skips = [row - number for number, row in enumerate(rows)]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Of a latent: the index has it, so that a sample is its key's length, key and values."""
        key, latent = self.column_encodings
        kind, dtype, sides = latent.split(":")
        if (self.column_names, key, kind, dtype) != (
            ["key", "latent"],
            "str",
            "ndarray",
            "float16",
        ):
            raise ValueError(f"{self.raw_data.basename}: holds {self.column_encodings}, no latents")
        return tuple(int(side) for side in sides.split(","))

    def get_item(self, idx: int) -> dict[str, Any]:
        """A sample's key, its latent as a view of the file, and this reader.

        Raises:
            FileNotFoundError: the shard was not fetched yet.
        """
        data, begin = self._find(idx)
        start = begin + 4 + int.from_bytes(data[begin : begin + 4], "little")
        latent = np.frombuffer(data, np.float16, math.prod(self.shape), offset=start)
        key = data[begin + 4 : start].decode()
        return {"key": key, "latent": latent.reshape(self.shape), "reader": self}

    def get_sample_data(self, idx: int) -> bytes:
        data, begin = self._find(idx)
        return data[begin : self._find(idx, end=1)[1]]

    def _find(self, idx: int, end: int = 0) -> tuple[mmap.mmap, int]:
        """The file, and where in it a sample begins, or ends."""
        data = _mapped(os.path.join(self.dirname, self.raw_data.basename))
        place = 4 * (1 + idx + bisect.bisect_right(self.skips, idx) + end)
        return data, int.from_bytes(data[place : place + 4], "little")


@functools.lru_cache(OPEN_SHARDS)
def _mapped(path: str) -> mmap.mmap:
    # A shard's name holds its fingerprint: what was mapped once under a name stays right.
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

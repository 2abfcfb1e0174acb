"""Shards of a latents group, as StreamingDataset takes them: one split, mapped, without what is
left out."""

from __future__ import annotations

import bisect
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from streaming import Stream
from streaming.base.format.mds import MDSReader

from training.config.plan import TrainingSource
from training.data.shard_files import ShardFiles
from training.data.token_vectors import TextGroup


class SplitStream(Stream):
    """Shards of a latents group, of one split.

    Args:
        files: of the group, those that are streamed.
        text: the captions of the same source.
        rows: input shard -> rows of its MDS shard that are left out, in ascending order.
        weight: its share of an epoch, relative to the other streams'; None for its size.
    """

    def __init__(
        self,
        source: TrainingSource,
        files: ShardFiles,
        text: TextGroup,
        rows: dict[str, list[int]],
        weight: float | None = None,
    ) -> None:
        folder = files.cache.folder if files.cached else Path(files.root)
        super().__init__(local=str(folder / files.group), proportion=weight)
        self.source = source
        self.files = files
        self.text = text
        self._rows = rows

    def get_shards(self, world, allow_unsafe_types: bool):
        """Readers of the wanted shards only: the others do not exist for the dataset."""
        readers = []
        for shard in self.files.shards():
            path = self.files.path(shard)
            # The library knows of no compression, and of no other root: a file is there or not.
            facts = {**self.files.entry(shard), "compression": None, "zip_data": None}
            facts["raw_data"] = {**facts["raw_data"], "basename": os.path.basename(path)}
            reader = MappedReader.from_json(self.local, "", facts)
            reader.stream, reader.input = self, shard
            reader.leave_out(self._rows.get(shard, []))
            if reader.samples:
                readers.append(reader)
        return readers

    def set_up_local(self, shards: list[Any], cache_usage_per_shard: np.ndarray) -> None:
        """Says which shards need not be fetched, by their size."""
        for place, shard in enumerate(shards):
            path = os.path.join(self.local, shard.raw_data.basename)
            there = not self.files.cached or os.path.exists(path)
            cache_usage_per_shard[place] = shard.raw_data.bytes if there else 0

    def prepare_shard(self, shard: Any) -> int:
        """Fetches ahead, in a thread of the library's; 0, as it counts nothing of ours."""
        self.files.prefetch(shard.input)
        self.text.files.prefetch(shard.input)
        return 0

    def get_index_size(self) -> int:
        return 0


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
        return tuple(map(int, self.column_encodings[1].split(":")[2].split(",")))

    @functools.cached_property
    def _values(self) -> int:
        return math.prod(self.shape)

    def get_item(self, idx: int) -> dict[str, Any]:
        """A sample's key, its latent as a view of the file, and this reader.

        Raises:
            BrokenShard: the shard is gone or damaged.
        """
        data, begin, end = self._find(idx)
        start = begin + 4 + int.from_bytes(data[begin : begin + 4], "little")
        try:
            if end - start != 2 * self._values:
                raise ValueError(f"sample {idx} has {end - begin} bytes")
            latent = np.frombuffer(data, np.float16, self._values, offset=start)
            key = str(data[begin + 4 : start], "utf-8")
        except ValueError as error:
            raise self.stream.files.damaged(self.input, error) from error
        return {"key": key, "latent": latent.reshape(self.shape), "reader": self}

    def get_sample_data(self, idx: int) -> bytes:
        data, begin, end = self._find(idx)
        return bytes(data[begin:end])

    def _find(self, idx: int) -> tuple[memoryview, int, int]:
        """The file, and where in it a sample begins and ends."""
        data = self.stream.files.map(self.input)
        place = 4 * (1 + idx + bisect.bisect_right(self.skips, idx))
        begin = int.from_bytes(data[place : place + 4], "little")
        return data, begin, int.from_bytes(data[place + 4 : place + 8], "little")

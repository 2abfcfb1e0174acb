"""Token vectors by picture key: random access into a text column group.

A text group stores each distinct caption of an input shard once, in MDS files that
`StreamingDataset` also opens; a parquet beside each maps picture keys to rows. Training reads
captions by key, so it needs its own reader: shards are mapped into memory (the page cache is the
only copy), and a bounded number stays open. Vectors are stored in float16, or in int8 with a column
of scales (`pipeline.core.tokens`); a shard's own header tells which.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.core.errors import SettingError
from pipeline.core.tokens import dequantise
from training.data.shard_files import ShardFiles

COLUMNS = (
    {"caption": "str", "tokens": "ndarray:float16"},
    {"caption": "str", "scales": "ndarray:float16", "tokens": "ndarray:int8"},
)
OPEN_SHARDS = 512  # a group, in each loader process: their keys; a shuffle block spans tens


class Caption(NamedTuple):
    text: str
    tokens: np.ndarray  # float16 (L, W), not to be written to: it may be a view of the shard


class TextGroup:
    """The captions of one source.

    Args:
        files: the group's.
        command: what makes the group, for error messages.
    """

    def __init__(self, files: ShardFiles, command: str) -> None:
        self.files = files
        self._command = command
        self._open = functools.lru_cache(OPEN_SHARDS)(functools.partial(_Shard, files))

    def read(self, shard: str, key: str) -> Caption:
        """The caption of a picture of this input shard.

        Raises:
            SettingError: there is none.
            BrokenShard: the shard is gone or damaged.
        """
        found = self._open(shard).read(key)
        if found is None:
            raise SettingError(
                f"picture {key} has a latent but no caption in {self.files.root}/"
                f"{self.files.group}; run {self._command}"
            )
        return found

    def __reduce__(self):  # for loader processes that are spawned: what is open stays behind
        return TextGroup, (self.files, self._command)


class _Shard:
    """One MDS file of captions with their token vectors, and its keys.

    Raises:
        SettingError: its columns are not those of a text group.
        BrokenShard: it is damaged.
    """

    def __init__(self, files: ShardFiles, shard: str) -> None:
        self._files, self._shard = files, shard
        entry = files.entry(shard)
        columns = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
        if columns not in COLUMNS:
            name = f"{files.root}/{files.group}/{entry['raw_data']['basename']}"
            raise SettingError(f"{name}: holds {columns}, no captions with their token vectors")
        self._columns = len(columns)
        # Two sorted arrays take a tenth of a dict's memory; there may be hundreds of these.
        self._keys, self._rows = files.key_rows(shard)
        if self._rows.size and self._rows.max() >= entry["samples"]:
            raise files.damaged(shard, ValueError("its keys point at rows beyond its captions"))

    def read(self, key: str) -> Caption | None:
        """None where no caption has this key."""
        wanted = key.encode()
        place = bisect.bisect_left(self._keys, wanted)  # 10 times as fast as searchsorted for one
        if place == len(self._keys) or self._keys[place] != wanted:
            return None
        data = self._files.map(self._shard)
        try:
            return self._caption(data, 4 * (1 + int(self._rows[place])))
        except (ValueError, IndexError) as error:
            raise self._files.damaged(self._shard, error) from error

    def _caption(self, data: memoryview, place: int) -> Caption:
        """The sample whose offset stands here. Raises ValueError where it is none."""
        text, *arrays = self._values(
            data, *np.frombuffer(data, np.uint32, 2, offset=place).tolist()
        )
        words = str(data[slice(*text)], "utf-8")
        if len(arrays) == 1:
            return Caption(words, _array(data, *arrays[0], np.float16))
        scales, tokens = (
            _array(data, *part, dtype)
            for part, dtype in zip(arrays, (np.float16, np.int8), strict=True)
        )
        return Caption(words, dequantise(tokens, scales))

    def _values(self, data: memoryview, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Begin and end of each value of the sample that starts here, columns sorted by name."""
        sizes = np.frombuffer(data, np.uint32, self._columns, offset=start).tolist()
        edges = [*itertools.accumulate(sizes, initial=start + 4 * self._columns)]
        if edges[-1] != end:
            raise ValueError(f"a sample of {end - start} bytes whose values take more or less")
        return itertools.pairwise(edges)


def _array(data: memoryview, start: int, end: int, dtype: type[np.generic]) -> np.ndarray:
    """An MDS array of two axes: their number and the width of their sizes in one byte."""
    axes, width = data[start] >> 2, 1 << (data[start] & 3)
    shape = np.frombuffer(data, f"u{width}", axes, offset=start + 1).astype(int)
    begin = start + 1 + axes * width
    if axes != 2 or begin + int(shape.prod()) * np.dtype(dtype).itemsize != end:
        raise ValueError(f"token vectors of shape {shape.tolist()} in {end - start} bytes")
    return np.frombuffer(data, dtype, int(shape.prod()), offset=begin).reshape(shape)

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
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.core.errors import SettingError
from pipeline.core.mds import stored, unpack
from pipeline.core.store import Store
from pipeline.core.tokens import dequantise

COLUMNS = (
    {"caption": "str", "tokens": "ndarray:float16"},
    {"caption": "str", "scales": "ndarray:float16", "tokens": "ndarray:int8"},
)
OPEN_SHARDS = 256  # a group, in each loader process; a shuffle block spans tens


class Caption(NamedTuple):
    text: str
    tokens: np.ndarray  # float16 (L, W), not to be written to: it may be a view of the shard


class TextGroup:
    """The captions of one source.

    Args:
        store: the data root.
        group: the group's path in it.
        cache: where shards of a remote root are copied to.
        command: what makes the group, for error messages.
    """

    def __init__(self, store: Store, group: str, cache: Path, command: str) -> None:
        self._store = store
        self._group = group
        self._cache = cache
        self._command = command
        index = store.read_json(f"{group}/index.json")
        self._files = {
            record["shard"]: (entry, record["keys"])
            for entry, record in zip(index["shards"], index["inputs"], strict=True)
        }
        self._open = functools.lru_cache(OPEN_SHARDS)(self._open_shard)

    def read(self, shard: str, key: str) -> Caption:
        """The caption of a picture of this input shard.

        Raises:
            SettingError: there is none.
        """
        try:
            return self._open(shard).read(key)
        except KeyError:
            raise SettingError(
                f"picture {key} has a latent but no caption in {self._store.url(self._group)}; "
                f"run {self._command}"
            ) from None

    def __reduce__(self):  # for loader processes that are spawned: maps and caches stay behind
        return TextGroup, (self._store, self._group, self._cache, self._command)

    def _open_shard(self, shard: str) -> _Shard:
        entry, keys = self._files[shard]
        return _Shard(self._local_shard(entry), self._local(keys))

    def _local_shard(self, entry: dict[str, Any]) -> Path:
        """The shard's file, unpacked where it is stored compressed."""
        name = entry["raw_data"]["basename"]
        if entry["zip_data"] is None:
            return self._local(name)
        target = self._cache / self._group / name
        if not target.exists():
            packed = self._store.read(f"{self._group}/{stored(entry)['basename']}")
            Store(self._cache).write(f"{self._group}/{name}", unpack(packed, entry))
        return target

    def _local(self, name: str) -> Path:
        path = f"{self._group}/{name}"
        if self._store.local:
            return Path(self._store.url(path))
        target = self._cache / path
        if not target.exists():  # names hold a fingerprint, so what is there is right
            Store(self._cache).write(path, self._store.read(path))
        return target


class _Shard:
    """One MDS file of captions with their token vectors, and its keys.

    Raises:
        SettingError: its columns are not those of a text group.
    """

    def __init__(self, data: Path, keys: Path) -> None:
        import pyarrow.parquet as pq

        table = pq.read_table(keys, columns=["key", "row"])
        names = np.array(table["key"].to_pylist(), dtype=np.bytes_)
        order = names.argsort()
        # Two sorted arrays take a tenth of a dict's memory; there may be 256 of these.
        self._keys, self._rows = names[order], table["row"].to_numpy()[order]
        with open(data, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = np.frombuffer(self._data, np.uint32, 1)[0]
        self._offsets = np.frombuffer(self._data, np.uint32, count + 1, offset=4)
        header = json.loads(self._data[4 + self._offsets.nbytes : self._offsets[0]])
        columns = dict(zip(header["column_names"], header["column_encodings"], strict=True))
        if columns not in COLUMNS:
            raise SettingError(f"{data}: holds {columns}, no captions with their token vectors")
        self._columns = len(columns)

    def read(self, key: str) -> Caption:
        """Raises KeyError where no caption has this key."""
        wanted = key.encode()
        place = bisect.bisect_left(self._keys, wanted)  # 10 times as fast as searchsorted for one
        if place == len(self._keys) or self._keys[place] != wanted:
            raise KeyError(key)
        text, *arrays = self._values(int(self._offsets[self._rows[place]]))
        text = self._data[slice(*text)].decode()
        if len(arrays) == 1:
            return Caption(text, _array(self._data, arrays[0][0], np.float16))
        scales, tokens = arrays
        values = _array(self._data, tokens[0], np.int8)
        return Caption(text, dequantise(values, _array(self._data, scales[0], np.float16)))

    def _values(self, start: int) -> Iterator[tuple[int, int]]:
        """Begin and end of each value of the sample that starts here, columns sorted by name."""
        sizes = np.frombuffer(self._data, np.uint32, self._columns, offset=start).tolist()
        return itertools.pairwise(itertools.accumulate(sizes, initial=start + 4 * self._columns))


def _array(data: mmap.mmap, start: int, dtype: type[np.generic]) -> np.ndarray:
    """An MDS array of stored shape: axes and the width of their sizes in one byte."""
    axes, width = data[start] >> 2, 1 << (data[start] & 3)
    shape = np.frombuffer(data, f"u{width}", axes, offset=start + 1).astype(int)
    values = np.frombuffer(data, dtype, int(shape.prod()), offset=start + 1 + axes * width)
    return values.reshape(shape)

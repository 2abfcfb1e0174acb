"""An MDS dataset as streaming's writer leaves it: plain or compressed, in sub-folders or not.

No state, no cache, nothing in shared memory: a shard is read whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pipeline.core.commits import reason
from pipeline.core.errors import BrokenShard, SettingError
from pipeline.core.mds import decode_shard, parse_index, unpack
from pipeline.core.store import Store


def read_index(dataset: str) -> list[dict[str, Any]]:
    """The shard entries of an MDS dataset.

    Raises:
        SettingError: there is no index.json, or not that of MDS shards.
    """
    try:
        entries, _ = parse_index(Store(dataset).read("index.json"))
        if not entries:
            raise ValueError("no shards")
    except FileNotFoundError:
        raise SettingError(
            f"--from {dataset}: no index.json there, so no MDS dataset (streaming's merge_index "
            "makes one of the sub-folders of an official run)"
        ) from None
    except ValueError as error:
        text = reason(error)
        raise SettingError(f"--from {dataset}: index.json is not that of MDS ({text})") from error
    return entries


def read_rows(
    dataset: Store, entry: dict[str, Any], columns: Collection[str]
) -> Iterator[dict[str, Any]]:
    """The samples of one shard: its file may be there packed, unpacked, or both.

    Raises:
        BrokenShard: it is gone, or not what its index says.
    """
    for facts in (entry["zip_data"], entry["raw_data"]):
        if facts is None:
            continue
        try:
            data = dataset.read(facts["basename"])
        except FileNotFoundError:
            continue
        where = dataset.url(facts["basename"])
        _check_file(where, data, facts)
        try:
            data = unpack(data, entry) if facts is entry["zip_data"] else data
            yield from decode_shard(data, columns)[1]
        except ValueError as error:
            raise BrokenShard(f"{where}: {error}") from error
        return
    raise BrokenShard(f"{dataset.url(entry['raw_data']['basename'])} is missing")


def _check_file(where: str, data: bytes, facts: dict[str, Any]) -> None:
    """Raises BrokenShard where a file is not as its index says."""
    if len(data) != facts["bytes"]:
        raise BrokenShard(f"{where} has {len(data)} bytes, its index says {facts['bytes']}")
    if facts["hashes"]:
        from streaming.base.hashing import get_hash  # takes seconds to import

        for name, value in facts["hashes"].items():
            if get_hash(name, data) != value:
                raise BrokenShard(f"{where} has another {name} than its index says")

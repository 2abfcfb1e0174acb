"""Which rows of a latents group training must not see: what `pipeline drop` took out.

The lists count from the moment they are written, before any shard is made anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.core.errors import SettingError
from pipeline.core.store import Store


def dropped_rows(
    store: Store,
    group: str,
    records: Iterable[dict[str, Any]],
    dropped: dict[str, frozenset[str]],
    command: str,
) -> dict[str, list[int]]:
    """Input shard -> rows of its MDS shard that are out, in order; only shards that have such.

    Args:
        records: of the "inputs" of the group's index.
        dropped: input shard -> keys, as `pipeline.core.drops.read` gives them.
        command: what makes the group, for error messages.

    Raises:
        SettingError: a shard with drops has no list of its keys: an older version made it.
    """
    if not dropped:
        return {}
    import io

    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    found = {}
    for record in records:
        keys = dropped.get(record["shard"])
        if not keys:
            continue
        try:
            data = store.read(f"{group}/{record['keys']}")
        except (KeyError, FileNotFoundError) as error:
            raise SettingError(
                f"{store.url(group)}: samples of shard {record['shard']} were dropped, and it has "
                f"no list of its keys to tell which; run {command} --stale"
            ) from error
        table = pq.read_table(io.BytesIO(data), columns=["key", "row"])
        hits = pc.is_in(table["key"], value_set=pa.array(sorted(keys)))  # pyright: ignore
        rows = sorted(table.filter(hits)["row"].to_pylist())
        if rows:
            found[record["shard"]] = rows
    return found

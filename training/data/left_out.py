"""Which rows of a latents group training must not see: what `pipeline drop` took out, and pictures
whose caption was rejected.

Both count from the moment they are written, before any shard is made anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.core import drops
from pipeline.core.commits import broken, read_file, read_named, scan
from pipeline.core.errors import SettingError
from pipeline.core.published import Commits, Row, read_whole
from pipeline.core.store import Store


@dataclass(frozen=True)
class LeftOut:
    """Of one source, in the shards that were asked about."""

    rows: dict[str, list[int]]  # input shard -> rows of its MDS shard, in order
    dropped: int  # pictures that were taken out
    refused: int  # others, whose caption was a counted reject of the text group

    def why(self) -> dict[str, int]:
        """Reason -> pictures, where there are any."""
        counts = {"dropped": self.dropped, "without a caption": self.refused}
        return {reason: count for reason, count in counts.items() if count}


def left_out(
    store: Store, source: str, latents_group: str, text_group: str, rows: list[Row], command: str
) -> LeftOut:
    """What is left out of these shards of a latents group.

    Args:
        rows: of the group's index.
        command: what makes the group, for error messages.

    Raises:
        SettingError: a shard with such pictures has no list of its keys: an older version made it.
        BrokenShard: a list of keys is gone or damaged.
    """
    from pipeline.core.tables import read_rows  # and pyarrow with it

    dropped = drops.read(store, source)
    refused = without_text(store, text_group, {record["shard"] for _, record in rows})
    found: dict[str, list[int]] = {}
    counts = {"dropped": 0, "refused": 0}
    commits = Commits(store, latents_group)
    for _, record in rows:
        shard = record["shard"]
        taken, lacking = dropped.get(shard, frozenset()), refused.get(shard, frozenset())
        if not taken and not lacking:
            continue
        if "keys" not in record:
            raise SettingError(
                f"{store.url(latents_group)}: samples of shard {shard} were dropped, and it has "
                f"no list of its keys to tell which; run {command} --stale"
            )
        data = read_whole(store, latents_group, commits, shard, record["keys"])
        try:
            keys, numbers = read_rows(data)
        except ValueError as error:
            raise broken(
                store, f"{latents_group}/{record['keys']}", f"is damaged: {error}"
            ) from error
        pairs = [(key, row) for key, row in zip(keys, numbers.tolist(), strict=True)]
        counts["dropped"] += sum(key in taken for key, _ in pairs)
        counts["refused"] += sum(key in lacking and key not in taken for key, _ in pairs)
        out = sorted(row for key, row in pairs if key in taken or key in lacking)
        if out:
            found[shard] = out
    return LeftOut(found, **counts)


def without_text(store: Store, group: str, shards: Iterable[str]) -> dict[str, frozenset[str]]:
    """Input shard -> keys that a text group counts as rejects, and has no caption for.

    Raises:
        BrokenShard: a list is gone or damaged.
    """
    from pipeline.core.tables import read_keys  # and pyarrow with it

    wanted, found = {*shards}, {}
    for commit in scan(store, group):
        if commit.shard not in wanted or not commit.rejects:
            continue
        name = next((name for name in commit.files if name.startswith("rejects/")), None)
        if name is None:
            continue
        try:
            rejected = read_keys(read_named(store, group, commit, name))
            there = read_keys(read_file(store, group, commit, ".parquet"))
        except (ValueError, KeyError) as error:
            where = f"{group}/commits/{commit.shard}.json"
            raise broken(
                store, where, f"names lists of keys that cannot be read ({error})"
            ) from error
        found[commit.shard] = frozenset(rejected) - frozenset(there)
    return found

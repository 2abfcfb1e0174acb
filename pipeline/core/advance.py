"""How far a worker's shards have come, for a bar that moves before the first of them is made.

Stages count in their own process; the pool reads it there. It decides nothing.
"""

from __future__ import annotations

from collections import Counter

_seen: Counter[str] = Counter()  # shard in hand -> samples dealt with, rejects included


def advance(shard: str, count: int = 1) -> None:
    _seen[shard] += count


def seen() -> dict[str, int]:
    return dict(_seen)


def finished(shard: str) -> None:
    _seen.pop(shard, None)

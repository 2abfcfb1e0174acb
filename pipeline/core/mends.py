"""Which shards of earlier versions hold what this version would make otherwise.

A mend that changes a few pictures must not make every shard stale. Commits say, among their
counters, how many mends the version knew that made them; of older ones the stored files are looked
through, once, and what is found is kept beside the groups. What concerns a shard stands in its
fingerprint's inputs ("mended") from then on: so it is stale, and is not once it is redone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.core.errors import BrokenShard, StorageError
from pipeline.core.store import Store, fingerprint

MENDS = 1  # raise it with each mend that changes pictures or captions, and look for what it changes
COUNTER = "mends"  # of a commit: what MENDS was in the version that made it

PIXELS, COLOURS, METADATA, ANSWERS = "pixels", "colours", "metadata", "answers"
REASONS = {
    PIXELS: "an earlier version read some of its pictures wrongly (colour profile, depth, padding)",
    COLOURS: "an earlier version saw some of its pictures in wrong colours (profile, 16-bit key)",
    METADATA: "some of its pictures hold metadata (EXIF with its place, XMP, comments)",
    ANSWERS: "some of its texts are no captions (thoughts, tags, code)",
}

SCHEMA = 1
AT_ONCE = 8  # shards that are looked at together
SAVE_EVERY_S = 60.0
SAY_EVERY_S = 10.0

Look = Callable[[Any], set[str]]  # a commit -> the kinds of what is in it


def look(
    store: Store,
    group: str,
    commits: Iterator[Any],
    total: int,
    looked: Look,
    announce: Callable[[str], None],
) -> dict[str, set[str]]:
    """Shard -> kinds of what it holds: as was found before, else by looking.

    Args:
        commits: of the group; each is looked at once as long as its files stay.
        total: how many they are.
        announce: called with a line when it takes long.
    """
    source, _, below = group.partition("/")
    path = f"{source}/looked/{below.replace('/', '+')}.json"
    known = _read(store, path)
    found: dict[str, set[str]] = {}
    saved = said = time.monotonic()
    changed = False

    def kinds(commit: Any) -> set[str] | None:
        entry = known.get(commit.shard)
        if entry is not None and entry[0] == fingerprint(commit.files):
            return set(entry[1])
        try:
            return looked(commit)
        except (BrokenShard, KeyError):
            return None  # `pipeline verify` says so

    with ThreadPoolExecutor(AT_ONCE, "look") as pool:
        while some := list(itertools.islice(commits, AT_ONCE)):
            for commit, its in zip(some, pool.map(kinds, some), strict=True):
                found[commit.shard] = its or set()
                entry = [fingerprint(commit.files), sorted(its or ())]
                if its is not None and known.get(commit.shard) != entry:
                    known[commit.shard], changed = entry, True
            now = time.monotonic()
            if now - said > SAY_EVERY_S:
                announce(
                    f"{group} was made by an earlier version; looking, once, for what this one "
                    f"mends: {len(found)} of {total} shards"
                )
                said = now
            if changed and now - saved > SAVE_EVERY_S:
                _write(store, path, known, announce)
                saved, changed = now, False
    if changed:
        _write(store, path, known, announce)
    return found


def _read(store: Store, path: str) -> dict[str, list[Any]]:
    try:
        record = store.read_json(path)
        if record["schema"] == SCHEMA:
            return dict(record["shards"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        pass  # nothing was looked at, or the record is damaged: it is looked at again
    return {}


def _write(
    store: Store, path: str, known: dict[str, list[Any]], announce: Callable[[str], None]
) -> None:
    try:
        store.write_json(path, {"schema": SCHEMA, "shards": known})
    except StorageError as error:  # who may only read may look all the same
        announce(f"what was found cannot be kept, so it is looked for again next time: {error}")

"""What `pipeline drop`, its --purge and `pipeline verify --dropped` do, and what they print."""

from __future__ import annotations

import codecs
import re
import shlex
import sys
from pathlib import Path

import typer

from pipeline.core import drops, lease
from pipeline.core.errors import SettingError, StorageError
from pipeline.core.store import Store
from pipeline.dropping import prune, traces
from pipeline.dropping.drop import describe, drop, nearest, read_list
from pipeline.dropping.purge import purge
from pipeline.engine.inventory import sources_of
from pipeline.engine.progress import Count


def take_out(store: Store, sources: list[str], keys: str | None, urls: str | None) -> int:
    """Drops what a list names; how many of its entries are in no shard."""
    column, name = ("key", keys) if keys is not None else ("url", urls or "")
    entries = read_list(_lines(f"--{column}s", name))
    if not entries:
        raise SettingError(f"--{column}s {name}: names nothing")
    if column == "key" and len(sources) > 1:
        raise SettingError(
            "drop --keys: a key is unique in its source only; name it with --source, there are: "
            + ", ".join(sources)
        )
    matched: set[str] = set()
    for name in sources:
        with Count(f"drop {name}") as count:
            found = drop(store, name, entries, column, count)
        matched |= found.matched | found.gone | found.listed
        print("\n".join(describe(name, found)))
    unmatched = [entry for entry in entries if entry not in matched]
    if unmatched:
        print("\n".join(_unmatched(store, sources, unmatched, column)))
    return len(unmatched)


def purge_sources(store: Store, sources: list[str], yes: bool, dry_run: bool) -> None:
    groups = [group for name in sources for group in prune.leased(store, name)]
    lease.refuse_if_held(store, groups, remedy=lease.WAIT)
    left = _left(store, sources)
    if not left:
        print("purge: nothing is left of any dropped sample")
        return
    if not yes and not dry_run and sys.stdin.isatty():
        yes = typer.confirm(f"remove them from {left} places?", err=True)
    if not yes:
        print(f"{left} places; nothing was removed; --yes removes them")
        return
    groups = [group for group in groups if store.exists(group)]
    broken: dict[str, str] = {}
    with lease.held(store, groups, shlex.join(["pipeline", *sys.argv[1:]]), remedy=lease.WAIT):
        for name in sources:
            with Count(f"purge {name}") as count:
                found = purge(store, name, traces.learn(store, name, count), count)
            for what, count in found.removed.items():
                print(f"{name}: removed {count} {what}")
            broken |= {f"{name}/{shard}": why for shard, why in found.broken.items()}
    for shard, why in broken.items():
        print(f"not purged: shard {shard}: {why}")
    if left := _left(store, sources):
        raise StorageError(
            f"purge: dropped samples are left in {left} places; mend what is named above, then "
            "run the same command again"
        )
    print("purge: nothing is left of any dropped sample")


def _left(store: Store, sources: list[str]) -> int:
    """Prints where dropped samples lie; in how many places."""
    left = 0
    for name in sources:
        with Count(f"dropped samples of {name}") as count:
            wanted = traces.learn(store, name, count)
            for trace in traces.find(store, name, wanted, count):
                print(trace, flush=True)
                left += 1
    return left


def _unmatched(store: Store, sources: list[str], entries: list[str], column: str) -> list[str]:
    """Lines about entries that are in no shard, with what is most like each."""
    near = {}
    for name in sources:
        with Count(f"what comes nearest in {name}") as count:
            for entry, found in nearest(store, name, entries, column, count).items():
                if entry not in near or found.likeness > near[entry][1].likeness:
                    near[entry] = name, found
    lines = []
    for entry in entries:
        line = f"in no shard: {entry}; "
        if entry in near:
            name, found = near[entry]
            what = found.text if column == "key" else f"{found.text}, key {found.key}"
            line += f"nearest: {what} of {name}"
        else:
            line += f"no {column} comes near it"
        lines.append(line)
    return lines


def verify_dropped(store: Store, source: str | None) -> None:
    """Proves that nothing is left of dropped samples, or exits with 1."""
    sources = sources_of(store, source)
    left = _left(store, sources)
    count = sum(len(keys) for name in sources for keys in drops.read(store, name).values())
    what = f"verify --dropped: {count} dropped samples of {len(sources)} sources: "
    if left:
        print(f"{what}left in {left} places; `pipeline drop --purge` removes them")
        raise typer.Exit(1)
    print(f"{what}nothing is left of them")


def _lines(option: str, name: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        # Windows writes UTF-16 as well, and says so by the file's first two bytes.
        wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        text = data.decode("utf-16" if wide else "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{option} {name}: cannot be read as text ({error})") from error
    return re.split("\r\n|\n|\r", text)

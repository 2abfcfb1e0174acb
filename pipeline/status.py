"""`pipeline status`: what is committed, from the commit records alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from pipeline.core.commits import read_commits
from pipeline.core.errors import SettingError, nearest
from pipeline.core.store import Store


@dataclass
class GroupStatus:
    """One group of one source."""

    source: str
    group: str  # below the source, e.g. latents/sdxl/256
    shards: int
    left: int  # input shards of the source that this group does not have
    stale: int  # made from images that have changed since
    samples: int
    splits: dict[str, int] = field(default_factory=dict)
    rejects: dict[str, int] = field(default_factory=dict)
    bytes: int = 0


def collect(root: str, source: str | None = None) -> list[GroupStatus]:
    """Every group under the root.

    Raises:
        SettingError: nothing is there, or no such source.
    """
    store = Store(root)
    sources = [name for name in store.folders("") if store.folders(f"{name}/images")]
    if not sources:
        raise SettingError(
            f"--root {root}: nothing there; start with `pipeline run download --source openmoji`"
        )
    if source is not None and source not in sources:
        raise SettingError(
            f"source={source}: not under {root}{nearest(source, sources)}; "
            f"there: {', '.join(sources)}"
        )
    rows = []
    for name in [source] if source else sources:
        images = {s: c.fingerprint for s, c in read_commits(store, f"{name}/images").items()}
        rows += [_status(store, name, group, images) for group in _groups(store, name)]
    return rows


def show(rows: list[GroupStatus]) -> None:
    table = Table("source", "group", "shards", "left", "stale", "samples", "rejects", "size")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        splits = ", ".join(f"{count} {split}" for split, count in row.splits.items())
        rejects = ", ".join(f"{count} {reason}" for reason, count in row.rejects.items())
        table.add_row(
            row.source,
            row.group,
            str(row.shards),
            str(row.left),
            str(row.stale),
            splits or "0",
            rejects or "0",
            _size(row.bytes),
        )
    Console(width=None if Console().is_terminal else 140).print(table)


def as_json(rows: list[GroupStatus]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1)


def _status(store: Store, source: str, group: str, images: dict[str, str]) -> GroupStatus:
    commits = read_commits(store, f"{source}/{group}")
    splits: Counter[str] = Counter()
    rejects: Counter[str] = Counter()
    for commit in commits.values():
        splits[commit.split] += commit.samples
        rejects.update(commit.rejects)
    stale = sum(
        "images" in commit.inputs and commit.inputs["images"] != images.get(shard)
        for shard, commit in commits.items()
    )
    return GroupStatus(
        source=source,
        group=group,
        shards=len(commits),
        left=len(images.keys() - commits.keys()),
        stale=stale,
        samples=sum(splits.values()),
        splits=dict(splits),
        rejects=dict(rejects),
        bytes=sum(file["bytes"] for c in commits.values() for file in c.files.values()),
    )


def _groups(store: Store, folder: str) -> list[str]:
    """Folders below a source that hold commits, in order."""
    found = []
    for name in store.folders(folder):
        below = store.folders(f"{folder}/{name}")
        if "commits" in below:
            found.append(name)
        elif name not in ("commits", "rejects"):
            found += [f"{name}/{group}" for group in _groups(store, f"{folder}/{name}")]
    return found


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"

"""`pipeline status`: what is done, left, stale and failing, from the commit records alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from pipeline import report
from pipeline.config import DataConfig, build_stage, load_config
from pipeline.core import layout
from pipeline.core.catalog import Catalog
from pipeline.core.errors import SettingError, nearest
from pipeline.core.store import Store, size
from pipeline.plan import GroupPlan, plan, summarise
from pipeline.progress import console
from pipeline.sources import SOURCES
from pipeline.stages import STAGES


@dataclass
class GroupStatus:
    """One group of one source."""

    source: str
    stage: str
    group: str  # below the source, e.g. latents/sdxl/256
    configured: bool  # whether the source's YAML asks for it; else only its pictures are compared
    done: int
    left: int
    stale: dict[str, int]  # why -> shards
    failing: dict[str, str]  # shard -> why
    samples: int
    splits: dict[str, int] = field(default_factory=dict)
    rejects: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    samples_per_s: float | None = None  # of the stage's last run


def collect(root: str, source: str | None = None, config: Path | None = None) -> list[GroupStatus]:
    """Every group under the root.

    Raises:
        SettingError: nothing is there, or no such source.
    """
    store = Store(root)
    sources = sources_of(store, source)
    catalog = Catalog(store)
    return [row for name in sources for row in _source(catalog, name, config)]


def show(rows: list[GroupStatus]) -> None:
    """A table, and below it why shards are stale or failing."""
    table = Table("source", "group", "done", "left", "stale", "failing", "samples", "rejects")
    table.add_column("size")
    table.add_column("samples/s")
    for column in table.columns[2:]:
        column.justify = "right"
    notes = []
    for row in rows:
        where = f"{row.source}/{row.group}"
        table.add_row(
            row.source,
            row.group if row.configured else f"{row.group} *",
            str(row.done),
            str(row.left),
            str(sum(row.stale.values())),
            str(len(row.failing)),
            ", ".join(f"{count} {split}" for split, count in row.splits.items()) or "0",
            ", ".join(f"{count} {reason}" for reason, count in row.rejects.items()) or "0",
            size(row.bytes),
            "" if row.samples_per_s is None else f"{row.samples_per_s:.0f}",
        )
        notes += [f"stale: {where}: {n} shards: {why}" for why, n in row.stale.items()]
        notes += [f"failing: {where}/{s}: {why}" for s, why in list(row.failing.items())[:20]]
        if len(row.failing) > 20:
            notes.append(f"failing: {where}: and {len(row.failing) - 20} more (--json has all)")
    console().print(table)
    if not all(row.configured for row in rows):
        notes.append("* not asked for by the source's YAML: compared with its pictures only")
    for note in notes:
        console().print(note, soft_wrap=True)


def as_json(rows: list[GroupStatus]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1)


def _source(catalog: Catalog, source: str, config: Path | None) -> list[GroupStatus]:
    known = _configured(catalog, source, config)
    rows = []
    for group in groups_of(catalog.store, source):
        stage = _stage_of(group)
        found = known.get(f"{source}/{group}")
        made = report.last(catalog.store, source, stage)
        rows.append(
            _row(
                source,
                stage,
                group,
                found or _unconfigured(catalog, source, group),
                found is not None,
                made["samples_per_s"] if made else None,
            )
        )
    return rows


def _configured(catalog: Catalog, source: str, path: Path | None) -> dict[str, GroupPlan]:
    """Group -> its plan, for the groups that the source's YAML asks for."""
    try:
        config: DataConfig = load_config(source, path, {})
    except SettingError:
        if path is not None:
            raise
        return {}  # a source that this version does not know, but whose shards are there
    known: dict[str, GroupPlan] = {}
    for name in STAGES:
        try:
            known |= plan(build_stage(name, config), catalog).groups
        except SettingError:
            continue  # weights that this machine does not have, captions that are not made yet
    return known


def _unconfigured(catalog: Catalog, source: str, group: str) -> GroupPlan:
    """A group compared with nothing but the pictures it was made of."""
    images = catalog.heads(layout.images_group(source))
    found = summarise(catalog, f"{source}/{group}")
    for commit in catalog.scan(f"{source}/{group}"):
        head = images.get(commit.shard)
        if head and commit.inputs.get("images", head.content) != head.content:
            found.stale["images were made anew"] += 1
        else:
            found.done += 1
    found.left = len(images.keys() - catalog.heads(f"{source}/{group}").keys())
    return found


def _row(
    source: str, stage: str, group: str, found: GroupPlan, configured: bool, rate: float | None
) -> GroupStatus:
    return GroupStatus(
        source=source,
        stage=stage,
        group=group,
        configured=configured,
        done=found.done,
        left=found.left,
        stale=dict(found.stale),
        failing=found.failing,
        samples=found.splits.total(),
        splits=dict(found.splits),
        rejects=dict(found.rejects),
        bytes=found.bytes,
        samples_per_s=rate,
    )


def sources_of(store: Store, source: str | None = None) -> list[str]:
    """The sources under a root, or the one that is named.

    Raises:
        SettingError: nothing is there, or no such source.
    """
    sources = [
        name
        for name in store.folders("")
        if set(layout.KINDS) & set(store.folders(name)) and groups_of(store, name)
    ]
    if not sources:
        hint = "" if source is None or source in SOURCES else nearest(source, SOURCES)
        hint = f" (source={source}: unknown{hint})" if hint else ""
        raise SettingError(
            f"--root {store.root}: nothing there{hint}; start with "
            "`pipeline run download --source openmoji`"
        )
    if source is not None and source not in sources:
        raise SettingError(
            f"source={source}: not under {store.root}{nearest(source, sources)}; "
            f"there: {', '.join(sources)}"
        )
    return sources if source is None else [source]


def groups_of(store: Store, source: str) -> list[str]:
    """Groups of a source, as paths below it, in order: folders that hold commits or failures."""
    return _groups(store, source, "")


def _groups(store: Store, source: str, folder: str) -> list[str]:
    found = []
    for name in store.folders(f"{source}/{folder}".rstrip("/")):
        path = f"{folder}/{name}".lstrip("/")
        below = store.folders(f"{source}/{path}")
        if "commits" in below or "failures" in below:
            found.append(path)
        elif below and name not in ("runs", "drops"):
            found += _groups(store, source, path)
    return found


def _stage_of(group: str) -> str:
    stages = {"images": "download", "captions": "caption", "official": "export"}
    return stages.get(group.split("/")[0], "encode")

"""`pipeline status`: what is done, left, stale and failing, from the commit records alone."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.measure import Measurement
from rich.table import Table

from pipeline.config import DataConfig, build_stage, load_config
from pipeline.core import layout
from pipeline.core.catalog import Catalog
from pipeline.core.errors import SettingError
from pipeline.core.mends import REASONS
from pipeline.core.store import Store, size
from pipeline.engine import report
from pipeline.engine.inventory import groups_of, sources_of
from pipeline.engine.plan import GroupPlan, plan, summarise
from pipeline.engine.progress import console
from pipeline.stages import STAGES
from pipeline.stages.looks import findings


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
    samples_per_s: float | None = None  # of the last run that made some of it
    begun: bool = True  # else the source's YAML asks for it, and no shard of it is there


def collect(root: str, source: str | None = None, config: Path | None = None) -> list[GroupStatus]:
    """Every group under the root.

    Raises:
        SettingError: nothing is there, or no such source.
    """
    store = Store(root)
    sources = sources_of(store, source)
    catalog = Catalog(store, functools.partial(print, file=sys.stderr))
    return [row for name in sources for row in _source(catalog, name, config)]


def show(rows: list[GroupStatus]) -> None:
    """A table, and below it why shards are stale or failing. Where the terminal is too narrow for
    every name and number of it, a few lines a group."""
    out, table = console(), _table(rows)
    if Measurement.get(out, out.options.update(width=10_000), table).maximum <= out.width:
        out.print(table)
    else:
        for row in rows:
            out.print(f"{row.source}/{_name(row)}", soft_wrap=True)
            out.print(f"  {_facts(row)}", soft_wrap=True)
    for note in _notes(rows):
        out.print(note, soft_wrap=True)


def _name(row: GroupStatus) -> str:
    return row.group if row.configured else f"{row.group} *"


def _facts(row: GroupStatus) -> str:
    """What a row of the table says, without the noughts."""
    counts = {"done": row.done, "left": row.left}
    counts |= {"stale": sum(row.stale.values()), "failing": len(row.failing)}
    shards = [f"{n} {name}" for name, n in counts.items() if n or name in ("done", "left")]
    facts = [
        f"shards: {', '.join(shards)}",
        _counts(row.splits, "samples: "),
        _counts(row.rejects, "rejects: "),
        size(row.bytes) if row.bytes else "",
        "" if row.samples_per_s is None else f"{row.samples_per_s:.0f} samples/s",
    ]
    return " · ".join(filter(None, facts))


def _counts(counts: dict[str, int], title: str = "") -> str:
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    return title + text if text else ""


def _table(rows: list[GroupStatus]) -> Table:
    table = Table("source", "group", "done", "left", "stale", "failing", "samples", "rejects")
    table.add_column("size")
    table.add_column("samples/s")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.source,
            _name(row),
            str(row.done),
            str(row.left),
            str(sum(row.stale.values())),
            str(len(row.failing)),
            _counts(row.splits) or "0",
            _counts(row.rejects) or "0",
            size(row.bytes),
            "" if row.samples_per_s is None else f"{row.samples_per_s:.0f}",
        )
    return table


def _notes(rows: list[GroupStatus]) -> list[str]:
    notes = []
    for row in rows:
        where = f"{row.source}/{row.group}"
        if not row.begun:
            command = f"pipeline run {row.stage} --source {row.source}"
            notes.append(f"not begun: {where}: the source's YAML asks for it; `{command}` makes it")
        notes += [f"stale: {where}: {n} shards: {why}" for why, n in row.stale.items()]
        notes += [f"failing: {where}/{s}: {why}" for s, why in list(row.failing.items())[:20]]
        if len(row.failing) > 20:
            notes.append(f"failing: {where}: and {len(row.failing) - 20} more (--json has all)")
    if not all(row.configured for row in rows):
        notes.append("* not asked for by the source's YAML: compared with its pictures only")
    return notes


def as_json(rows: list[GroupStatus]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1)


def _source(catalog: Catalog, source: str, config: Path | None) -> list[GroupStatus]:
    known, asked = _configured(catalog, source, config)
    there = groups_of(catalog.store, source)
    wanted = [group.removeprefix(f"{source}/") for group in asked]
    groups = sorted({*there, *wanted})
    stages = {group: _stage_of(group) for group in groups}
    rates = {
        stage: report.last_rates(catalog.store, source, stage) for stage in set(stages.values())
    }
    rows = []
    for group, stage in stages.items():
        where = f"{source}/{group}"
        found = known.get(where)
        row = _row(
            source,
            stage,
            group,
            found or _unconfigured(catalog, source, group),
            found is not None or group not in there,
            rates[stage].get(where),
        )
        row.begun = group in there
        rows.append(row)
    return rows


def _configured(
    catalog: Catalog, source: str, path: Path | None
) -> tuple[dict[str, GroupPlan], list[str]]:
    """Group -> its plan, for the groups that the source's settings name; and those of them that a
    YAML asks for: the others are defaults."""
    try:
        config: DataConfig = load_config(source, path, {})
    except SettingError:
        if path is not None:
            raise
        return {}, []  # a source that this version does not know, but whose shards are there
    known: dict[str, GroupPlan] = {}
    asked: list[str] = []
    for name in STAGES:
        try:
            stage = build_stage(name, config)
            asked += stage.groups() if name in config.model_fields_set else []
            known |= plan(stage, catalog).groups
        except SettingError:
            continue  # weights that this machine does not have, captions that are not made yet
    return known, asked


def _unconfigured(catalog: Catalog, source: str, group: str) -> GroupPlan:
    """A group compared with nothing but the pictures it was made of."""
    images = catalog.heads(layout.images_group(source))
    found = summarise(catalog, f"{source}/{group}")
    whole = f"{source}/{group}"
    mended = catalog.mended(whole, findings(catalog, whole))
    for commit in catalog.scan(f"{source}/{group}"):
        head = images.get(commit.shard)
        if head and commit.inputs.get("images", head.content) != head.content:
            found.stale["images were made anew"] += 1
        elif kinds := set(mended.get(commit.shard, ())) - set(commit.inputs.get("mended", ())):
            found.stale["; ".join(REASONS[kind] for kind in sorted(kinds))] += 1
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


def _stage_of(group: str) -> str:
    stages = {"images": "download", "captions": "caption", "official": "export"}
    return stages.get(group.split("/")[0], "encode")

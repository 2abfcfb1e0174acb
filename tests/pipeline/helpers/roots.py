"""Small data roots for tests, made in process (no Ray)."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.core.catalog import Catalog
from pipeline.core.groups import publish
from pipeline.core.rules import keep
from pipeline.core.samples import ImageSample
from pipeline.core.stage import Stage
from pipeline.core.store import Store
from pipeline.core.tars import write_tar
from pipeline.engine.plan import Choice, plan
from pipeline.engine.runner import remove_leftovers as _remove_leftovers
from pipeline.sources.openmoji import OpenMoji

SETTINGS = OpenMoji(glyphs="avocado;rocket;red heart", backgrounds="blue,red", size=64)


def pictures(source: OpenMoji = SETTINGS, number: int = 0) -> list[ImageSample]:
    """What the download stage stores of a shard."""
    found = [keep(item, source.rules) for item in source.fetch(source.shards()[number])]  # pyright: ignore
    return [item for item in found if isinstance(item, ImageSample)]


def tar_of(members: Iterable[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    write_tar(file, members)
    return file.getvalue()


def run_here(stage: Stage, store: Store, choice: Choice | None = None) -> int:
    """Runs what a stage has left, in this process; how many shards that was."""
    catalog = Catalog(store)
    todo = plan(stage, catalog, choice or Choice())
    work = stage.open(store)
    for job in todo.jobs(stage, catalog):
        work(job)
    for group in stage.groups():
        publish(store, group)
    return len(todo.pending)


def remove_leftovers(store: Store, group: str) -> None:
    """As a run does when it begins, alone."""
    _remove_leftovers(store, group, alone=True)


def mds_rows(store: Store, group: str) -> list[dict[str, Any]]:
    """Every sample of a group, read by the streaming library."""
    from streaming import LocalDataset

    dataset = LocalDataset(store.url(group))
    return [dataset[i] for i in range(len(dataset))]


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder whose bytes must not depend on how it was made."""
    files = (p for p in root.rglob("*") if p.is_file() and not _timed(p.relative_to(root)))
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def _timed(path: Path) -> bool:
    return path.name.endswith("_stats.json") or path.parts[1] == "runs"

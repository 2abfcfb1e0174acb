"""What it costs to control many shards: status, planning, the driver's memory, cost an image."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, median, seconds
from pipeline.config import build_stage, load_config
from pipeline.core.catalog import Catalog
from pipeline.core.commits import Commit, keys_hash
from pipeline.core.samples import InputShard
from pipeline.core.store import Store, fingerprint
from pipeline.engine.pool import Options
from pipeline.engine.runner import run
from tests.pipeline.helpers.tiny_stage import TinyStage

SHARDS = 10_000
PIPELINE = str(Path(sys.executable).with_name("pipeline"))


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        root = Path(name)
        yield from _metadata(root / "metadata")
        yield from _runs(root)


def _metadata(root: Path) -> Iterator[Row]:
    """Commits of 10,000 shards in four groups, as the demo's YAML would make them."""
    groups = _fill(root, SHARDS)
    shown = f"{SHARDS:,} shards in {groups} groups"
    status = [PIPELINE, "status", "--root", str(root)]
    time_s, memory_mb = _command(status)
    yield Row(
        f"`pipeline status`, {shown}, local root",
        f"{time_s:.1f} s, {memory_mb:.0f} MB",
        "3 s, 300 MB",
        time_s <= 3 and memory_mb <= 300,
    )
    plan = [PIPELINE, "run", "encode", "--source", "openmoji", "--root", str(root), "--dry-run"]
    time_s, memory_mb = _command(plan)
    yield Row(
        f"planning the next run (`encode --dry-run`), {SHARDS:,} shards",
        f"{time_s:.1f} s, {memory_mb:.0f} MB",
        "5 s",
        time_s <= 5,
    )


def _runs(root: Path) -> Iterator[Row]:
    """The real runner over shards of next to no work."""
    peaks = {}
    for shards in (100, 1_000, 10_000):
        peaks[shards] = _run(root, shards, 1).megabytes
    yield Row(
        "driver's memory over that of a run of 100 shards: 1,000 shards, 10,000 shards",
        f"{peaks[1_000] - peaks[100]:+.0f} MB, {peaks[10_000] - peaks[100]:+.0f} MB "
        f"(of {peaks[100]:.0f} MB)",
        "flat: below 30 MB",
        peaks[10_000] - peaks[100] < 30,
    )
    few, many = (
        median(lambda count=count: _run(root, count, 100).seconds / (count * 100))
        for count in (100, 1_000)
    )
    yield Row(
        "cost an image, 100,000 images against 10,000, 100 a shard, next to no work",
        f"{many / few:.2f}× ({many * 1e6:.0f} against {few * 1e6:.0f} µs)",
        "at most 1.10×",
        many <= 1.1 * few,
    )


def _run(root: Path, shards: int, samples: int) -> _Peak:
    folder = root / "run"
    with _Peak() as peak:
        run(TinyStage(shards, samples), str(folder), Options(workers=1), peak.progress)
    shutil.rmtree(folder)
    return peak


def _fill(root: Path, shards: int) -> int:
    """Commit records with what the demo's plan wants of them, so that all are done."""
    store = Store(root)
    config = load_config("openmoji", None, {})
    images = [InputShard(f"{n:05d}", "train" if n % 8 else "heldout") for n in range(shards)]
    fake = {".tar": "0" * 64, ".parquet": "1" * 64}
    _write(root, "openmoji/images", {shard: {"stage": "download"} for shard in images}, fake)
    groups = 1
    for name in ("caption", "encode"):
        catalog = Catalog(store)
        wanted: dict[str, dict[InputShard, dict[str, Any]]] = {}
        for job in build_stage(name, config).plan(catalog):
            for group, inputs in job.groups.items():
                wanted.setdefault(group, {})[job.shard] = inputs
        for group, jobs in wanted.items():
            _write(root, group, jobs, {".mds": "2" * 64, ".parquet": "3" * 64})
            groups += 1
    return groups


def _write(
    root: Path, group: str, jobs: dict[InputShard, dict[str, Any]], files: dict[str, str]
) -> None:
    folder = root / group / "commits"
    folder.mkdir(parents=True)
    for shard, inputs in jobs.items():
        commit = Commit(
            shard.id,
            shard.split,
            fingerprint(inputs),
            inputs,
            {shard.id + e: {"bytes": 10_000_000, "sha256": h} for e, h in files.items()},
            1000,
            keys_hash([shard.id]),
            {"undecodable": 3},
        )
        (folder / f"{shard.id}.json").write_text(json.dumps(asdict(commit), indent=1))


def _command(line: list[str]) -> tuple[float, float]:
    """(median seconds, most megabytes) of a command."""

    def once() -> float:
        return seconds(lambda: subprocess.run(line, check=True, capture_output=True))

    spent = median(once)
    return spent, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000


class _Peak:
    """The most memory that this process takes in a block, and the seconds from the first worker's
    start to the last shard."""

    def __enter__(self) -> _Peak:
        self.megabytes, self._began, self.seconds = 0.0, 0.0, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def progress(self, report: Any) -> None:
        if report.workers and not self._began:
            self._began = time.perf_counter()
        if report.finished < report.total:
            self.seconds = 0.0
        elif not self.seconds:
            self.seconds = time.perf_counter() - self._began

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._stop.wait(0.02):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.megabytes = max(self.megabytes, pages * page / 1e6)

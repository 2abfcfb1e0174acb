"""What Ray costs: the same shards through `pipeline run` with one worker and in a plain loop."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rows import REPEATS, Row
from pipeline.core.catalog import Catalog
from pipeline.core.stage import Stage
from pipeline.core.store import Store
from pipeline.engine.plan import plan
from pipeline.engine.pool import Options
from pipeline.engine.runner import run
from pipeline.sources.openmoji import OpenMoji
from pipeline.stages.caption import CaptionStage
from pipeline.stages.download import Download
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings

SETTINGS = EncodeSettings("tiny4", "tiny-clip", (128,), "alt", "trimmed")


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        root = Path(name, "root")
        stages: list[Stage] = [
            Download("openmoji", OpenMoji(samples_per_shard=16)),
            CaptionStage("openmoji", "colour"),
            Encode("openmoji", SETTINGS),
        ]
        for stage in stages:
            ratios, loops = [], []
            for _ in range(REPEATS):
                loops.append(_loop(stage, _copy(root, Path(name, "loop"))))
                ratios.append(_ray(stage, _copy(root, Path(name, "ray"))) / loops[-1])
            ratio = statistics.median(ratios)
            yield Row(
                f"`pipeline run {stage.name}` with one worker against a plain loop in one process, "
                "without its start",
                f"{ratio:.2f}× ({min(ratios):.2f}–{max(ratios):.2f}; loop "
                f"{statistics.median(loops):.1f} s)",
                "at most 1.10×",
                ratio <= 1.1,
            )
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(Path(name, "ray"), root)


def _copy(root: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    if root.exists():
        shutil.copytree(root, target)
    return target


def _loop(stage: Stage, root: Path) -> float:
    store = Store(root)
    catalog = Catalog(store)
    jobs = list(plan(stage, catalog).jobs(stage, catalog))
    work = stage.open(store)
    # Weights are loaded with the first shard: before the clock starts, as in `_ray`.
    work(jobs[0])
    started = time.perf_counter()
    for job in jobs[1:]:
        work(job)
    return time.perf_counter() - started


def _ray(stage: Stage, root: Path) -> float:
    moments: dict[int, float] = {}

    def progress(report: Any) -> None:
        moments.setdefault(report.finished, time.perf_counter())

    report = run(stage, str(root), Options(workers=1), progress)
    return moments[report.total] - moments[1]

"""Progress of a run: a bar on a terminal, plain lines elsewhere, and the table at the end."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from pipeline.runner import Report

LINE_INTERVAL_S = 10.0


class Progress:
    """Called by the runner after each shard; a context manager."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Bar | None = None
        self._task = None
        self._last_line = 0.0
        if sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(
                    "shards · {task.fields[samples]} samples · {task.fields[rejects]} rejects"
                ),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, report: Report, total: int) -> None:
        done = report.shards + len(report.failed)
        rejects = sum(report.rejects.values())
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self.title, total=total, samples=0, rejects=0)
            self._bar.update(self._task, completed=done, samples=report.samples, rejects=rejects)
            return
        now = time.monotonic()
        if total and (done == total or now - self._last_line >= LINE_INTERVAL_S):
            self._last_line = now
            rate = report.samples / report.seconds if report.seconds else 0.0
            left = f", {(total - done) * report.seconds / done:.0f} s left" if done else ""
            print(
                f"{self.title}: {done}/{total} shards, {report.samples} samples, "
                f"{rejects} rejects, {rate:.0f} samples/s{left}",
                file=sys.stderr,
                flush=True,
            )


def summarise(source: str, report: Report) -> None:
    """The facts of a finished run, a line each, on standard output."""
    rate = f", {report.samples / report.seconds:.0f} samples/s" if report.samples else ""
    print(
        f"{report.stage} {source}: {report.shards} shards made ({report.samples} samples{rate}), "
        f"{report.skipped} already done, {len(report.failed)} failed, {report.seconds:.1f} s"
    )
    for reason, count in sorted(report.rejects.items()):
        print(f"  rejected: {count} {reason} (see rejects/ in the group)")
    if report.stale:
        shard, why = next(iter(report.stale.items()))
        print(
            f"  stale: {len(report.stale)} shards were made from other inputs; --stale redoes them "
            f"({shard}: {why})"
        )
    if report.fruitless:
        print("  failed: every sample was rejected; is it the right setting for this source?")
    for shard, error in sorted(report.failed.items()):
        print(f"  failed: shard {shard}: {error}")

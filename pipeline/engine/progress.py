"""Progress of a run: a bar on a terminal, plain lines elsewhere, and the table at the end."""

from __future__ import annotations

import sys
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from pipeline.core.store import size
from pipeline.engine.report import Report

LINE_INTERVAL_S = 10.0
RECENT_S = 300.0  # the rate and the time left are of this long, not of the whole run


class Progress:
    """Called by the runner after each shard, and each second; a context manager."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._last_line = time.monotonic() - LINE_INTERVAL_S + 2.0
        self._recent: deque[tuple[float, float, int]] = deque()  # (moment, shards, samples)
        if sys.stderr.isatty():
            self._bar = _bar()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            facts = "looking at what there is to do"
            self._task = self._bar.add_task(self.title, total=None, facts=facts)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def announce(self, line: str) -> None:
        if self._bar is None or self._task is None:
            print(line, file=sys.stderr, flush=True)
            return
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._bar.update(self._task, facts="starting Ray")

    def __call__(self, report: Report) -> None:
        facts = self._facts(report)
        if self._bar is not None and self._task is not None:
            at = report.advanced
            self._bar.update(self._task, total=report.total, completed=at, facts=facts)
            return
        now = time.monotonic()
        if report.finished == report.total or now - self._last_line >= LINE_INTERVAL_S:
            if report.finished < report.total or self._last_line >= 0:
                done = f"{report.finished}/{report.total}"
                print(f"{self.title}: {done} shards · {facts}", file=sys.stderr, flush=True)
            self._last_line = now if report.finished < report.total else float("-inf")

    def _facts(self, report: Report) -> str:
        rate, left = self._recently(report)
        facts = [
            f"{report.samples} samples",
            *([f"{report.samples_in_hand} in hand"] if report.samples_in_hand else []),
            f"{rate:.0f} samples/s",
            f"{sum(report.rejects.values())} rejects",
            f"{report.workers} workers" if report.workers else "workers are starting",
        ]
        if report.failed:
            facts.append(f"{report.failed} failed")
        if report.stopped:
            facts.append("finishing the shards in hand")
        elif left is not None and report.finished < report.total:
            facts.append(f"{duration(left)} left")
        return " · ".join(facts)

    def _recently(self, report: Report) -> tuple[float, float | None]:
        """Samples a second, and the seconds left, at the pace of the last minutes."""
        now = report.seconds
        at, made = report.advanced, report.samples + report.samples_in_hand
        if not self._recent or self._recent[-1][1:] != (at, made):
            self._recent.append((now, at, made))
        while len(self._recent) > 2 and now - self._recent[0][0] > RECENT_S:
            self._recent.popleft()
        since, shards, samples = self._recent[0]
        passed = now - since
        if passed <= 0 or (at <= shards and made <= samples):
            return 0.0, None
        left = (report.total - at) * passed / (at - shards) if at > shards else None
        return max(0.0, (made - samples) / passed), left


class Count:
    """Progress of a command that counts shards and is no run; a context manager."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._task: TaskID | None = None
        self._last_line = time.monotonic() - LINE_INTERVAL_S + 2.0
        self._started = time.monotonic()
        self._bar = _bar() if sys.stderr.isatty() else None

    def __enter__(self) -> Count:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, facts: str = "") -> None:
        now = time.monotonic()
        if done < total and now - self._started > 2:
            left = (now - self._started) / max(done, 1) * (total - done)
            facts = " · ".join([*([facts] if facts else []), f"{duration(left)} left"])
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self.title, total=total, facts="")
            self._bar.update(self._task, completed=done, facts=facts)
        elif now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            print(f"{self.title}: {done}/{total} shards · {facts}", file=sys.stderr, flush=True)


def _bar() -> Bar:
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else what goes to a file would come here
    )


def table(reports: list[Report]) -> None:
    """What a command of several runs did, a row a run."""
    names = ("made", "there", "failed", "samples", "rejects", "wrote", "time")
    rows = Table("source", "stage", *names)
    for column in rows.columns[2:]:
        column.justify = "right"
    for report in reports:
        there = report.skipped + report.elsewhere + report.outdated
        counts = (report.shards, there, report.failed, report.samples)
        rows.add_row(
            report.source,
            report.stage,
            *map(str, counts),
            str(report.rejects.total()),
            size(report.bytes),
            duration(report.seconds),
        )
    console().print(rows)
    reasons = sorted({reason for report in reports for reason in report.rejects})
    if reasons:
        console().print(_rejects(reports, reasons))


def _rejects(reports: list[Report], reasons: list[str]) -> Table:
    """Why samples were left out: a row a run, a column a reason."""
    rows = Table("source", "stage", *reasons, title="rejects")
    for column in rows.columns[2:]:
        column.justify = "right"
    for report in reports:
        if report.rejects:
            counts = (str(report.rejects[reason] or "") for reason in reasons)
            rows.add_row(report.source, report.stage, *counts)
    return rows


def console() -> Console:
    """As wide as the terminal, and wide enough for a log where there is none."""
    return Console(width=None if Console().is_terminal else 160, markup=False)


def duration(seconds: float) -> str:
    """3 s, 4 min 05 s, 2 h 07 min, 3 d 04 h."""
    whole = round(seconds)
    for unit, below, small in ((86400, 3600, "d h"), (3600, 60, "h min"), (60, 1, "min s")):
        if whole >= unit:
            first, second = small.split()
            return f"{whole // unit} {first} {whole % unit // below:02d} {second}"
    return f"{whole} s"

"""Runs a stage over its pending shards: lease, plan, preflight, pool, index, report.

A shard that keeps failing is recorded and reported, and the run goes on; a root that fails ends it.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from pipeline.core import failures, lease
from pipeline.core.catalog import Catalog
from pipeline.core.errors import SettingError
from pipeline.core.groups import publish
from pipeline.core.stage import Shows, Stage
from pipeline.core.store import Store
from pipeline.engine.plan import Plan, plan, preflight
from pipeline.engine.pool import Failure, Options, Pool, start
from pipeline.engine.report import Report

PUBLISH_EVERY_S = 600.0  # so that training can begin on what is there, days before the end


def run(
    stage: Stage,
    root: str,
    options: Options,
    progress: Callable[[Report], None] = lambda report: None,
    announce: Callable[[str], None] = lambda line: None,
) -> Report:
    """Does what is left of a stage, then publishes its groups.

    Args:
        progress: called with the report after each shard, and at least each second.
        announce: called with a line that says what the run will need, before it begins.

    Raises:
        SettingError: no cluster at `address`, nothing to work on, another run holds a group, or
            the disk is too small.
        StorageError: the root failed. What was committed until then stays.
    """
    store = Store(root)
    groups = stage.groups()
    with lease.held(store, groups, options.command, options.join):
        catalog = Catalog(store, announce)
        todo = plan(stage, catalog, options.choice)
        if not todo.pending and not todo.done and not todo.outdated:
            raise SettingError(
                f"{stage.name}: no input under {store.root}; run the stage before it"
            )
        report = Report(
            stage.name,
            stage.source,
            total=len(todo.pending),
            skipped=todo.done,
            outdated=todo.outdated,
        )
        if not (options.choice.stale or options.choice.force):
            report.stale = todo.stale
        for group in groups:
            remove_leftovers(store, group, alone=not options.join)
        if todo.pending:
            announce(preflight(stage, store, todo, options.quota))
            with _Signals(report) as signals:
                _work(stage, catalog, todo, options, report, progress, announce, signals)
        if not report.stopped:
            for line in _publish(store, groups):
                announce(line)
        report.seconds = time.time() - report.started_at
        if todo.pending:
            if report.shards and isinstance(stage, Shows):
                shown = stage.page(store, report.counters, report.seconds)
                report.page = report.path().removesuffix(".json") + ".html"
                store.write(report.page, shown.encode())
            report.write(store)
    return report


def remove_leftovers(store: Store, group: str, alone: bool) -> None:
    for folder in ("", "/commits", "/rejects", "/leases", "/failures"):
        store.remove_leftovers(group + folder, alone)


def _publish(store: Store, groups: list[str]) -> list[str]:
    """Lines about those that keep the index and manifest that they have."""
    lines = []
    for group in groups:
        if store.names(f"{group}/commits") and (mixed := publish(store, group)):
            lines.append(
                f"{group}: {mixed}; its index and manifest stay as they were until --stale has "
                "made the others anew"
            )
    return lines


def _work(
    stage: Stage,
    catalog: Catalog,
    todo: Plan,
    options: Options,
    report: Report,
    progress: Callable[[Report], None],
    announce: Callable[[str], None],
    signals: _Signals,
) -> None:
    store = catalog.store
    failing = {shard for group in todo.groups.values() for shard in group.failing}
    published = time.monotonic()
    ray = start(options, announce)
    signals.arm()
    pool = Pool(ray, stage, store, options, report)
    try:
        jobs = todo.jobs(stage, catalog)
        if options.join:  # in another order than the run it helps, or both make the same shards
            jobs = iter(random.sample(found := list(jobs), len(found)))
        for outcome in pool.outcomes(jobs):
            if outcome is not None:
                job, found = outcome
                groups = list(job.groups)
                if isinstance(found, Failure):
                    report.fail(job.shard.id, found.error)
                    failures.record(store, groups, job.shard.id, found.error, found.attempts)
                else:
                    if found.made:
                        report.add(found.commits)
                    else:
                        report.elsewhere += 1
                    report.counters.update(found.counters)
                    if job.shard.id in failing:
                        failures.clear(store, groups, job.shard.id)
            report.seconds = time.time() - report.started_at
            progress(report)
            if time.monotonic() - published > PUBLISH_EVERY_S:
                _publish(store, stage.groups())
                published = time.monotonic()
    finally:
        pool.close()
        ray.shutdown()
        for group in stage.groups():  # of workers that died, or were stopped, in the middle
            remove_leftovers(store, group, alone=not options.join)


class _Signals:
    """SIGTERM and SIGINT stop the run after the shards in hand; a second one stops it at once."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        self.before = {number: signal.getsignal(number) for number in _STOP}
        self.arm()
        return self

    def arm(self) -> None:
        """Again after ray.init, which puts a handler of its own in place."""
        if threading.current_thread() is threading.main_thread():
            for number in _STOP:
                signal.signal(number, self._stop)

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: object) -> None:
        if self.report.stopped:
            os._exit(128 + number)
        self.report.stopped = signal.Signals(number).name


_STOP = (signal.SIGTERM, signal.SIGINT)

"""Runs a stage over its pending shards on Ray: the only file that imports it.

The driver holds a bounded window of jobs, one in flight for each worker; a worker is an actor that
loads weights once and commits each shard itself, so nothing but counts travels through Ray. A
worker that dies costs its shard a retry; a shard that keeps failing is reported, the run goes on.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.commits import Commit, differences, read_commits
from pipeline.core.errors import SettingError
from pipeline.core.groups import publish
from pipeline.core.store import Store, fingerprint
from pipeline.stages import Job, Stage

ATTEMPTS = 3  # of a shard, before it is reported as failed


@dataclass
class Plan:
    """What a run will do, from the commits alone."""

    jobs: list[Job] = field(default_factory=list)  # missing shards, with their missing groups
    groups: set[str] = field(default_factory=set)  # every output group of the stage
    done: int = 0  # shards with nothing to do
    stale: dict[str, str] = field(default_factory=dict)  # shard -> why; redone only if asked


@dataclass
class Report:
    """What a run did."""

    stage: str
    shards: int = 0
    skipped: int = 0
    samples: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    stale: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # shard -> error
    seconds: float = 0.0

    @property
    def fruitless(self) -> bool:
        """Shards were made and every sample of them rejected: a wrong setting, not bad pictures."""
        return self.shards > 0 and self.samples == 0 and bool(self.rejects)


def plan(stage: Stage, store: Store, stale: bool = False) -> Plan:
    """Compares what the stage would make with what is committed."""
    result = Plan()
    commits: dict[str, dict[str, Commit]] = {}
    for job in stage.plan(store):
        missing: dict[str, dict[str, Any]] = {}
        for group, inputs in job.groups.items():
            result.groups.add(group)
            if group not in commits:
                commits[group] = read_commits(store, group)
            commit = commits[group].get(job.shard.id)
            if commit is None:
                missing[group] = inputs
            elif commit.fingerprint != fingerprint(inputs):
                reasons = differences(commit.inputs, inputs)
                result.stale[f"{group}/{job.shard.id}"] = "; ".join(reasons)
                if stale:
                    missing[group] = inputs
        if missing:
            result.jobs.append(Job(job.shard, missing))
        else:
            result.done += 1
    return result


def run(
    stage: Stage,
    root: str,
    workers: int | None = None,
    address: str | None = None,
    stale: bool = False,
    progress: Callable[[Report, int], None] = lambda report, total: None,
) -> Report:
    """Does what is left of a stage, then publishes its groups.

    Args:
        workers: actors of one CPU each; default is every CPU Ray offers.
        address: a running Ray cluster; None starts a private one on this machine.
        stale: also redo shards whose inputs changed since they were made.
        progress: called after each shard with the report so far and the number of pending shards.

    Raises:
        SettingError: no cluster at `address`, or nothing to work on.
    """
    store = Store(root)
    todo = plan(stage, store, stale)
    if not todo.jobs and not todo.done:
        raise SettingError(f"{stage.name}: no input under {store.root}; run the stage before it")
    for group in todo.groups:
        for folder in (group, f"{group}/commits", f"{group}/rejects"):
            store.remove_leftovers(folder)
    report = Report(stage.name, skipped=todo.done, stale={} if stale else todo.stale)
    started = time.monotonic()
    progress(report, len(todo.jobs))
    if todo.jobs:
        for job, outcome in _execute(stage, store.root, todo.jobs, workers, address):
            if isinstance(outcome, str):
                report.failed[job.shard.id] = outcome
            else:
                report.shards += 1
                for commit in outcome.values():
                    report.rejects.update(commit.rejects)
                # A picture with a caption but no latent, say, is of no use to anyone.
                report.samples += min(commit.samples for commit in outcome.values())
            report.seconds = time.monotonic() - started
            progress(report, len(todo.jobs))
    for group in sorted(todo.groups):
        manifest = stage.manifest(group)
        if manifest is not None:
            publish(store, group, manifest)
    report.seconds = time.monotonic() - started
    return report


def _execute(
    stage: Stage, root: str, jobs: list[Job], workers: int | None, address: str | None
) -> Iterator[tuple[Job, dict[str, Commit] | str]]:
    """(job, its commits or an error text) as they finish."""
    ray: Any = _start(workers, address)
    try:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        count = max(1, min(workers or cpus, len(jobs)))
        # One thread a worker: more workers, same bytes.
        actor = ray.remote(num_cpus=1, max_restarts=0)(_Worker)
        queue = [(job, 1) for job in reversed(jobs)]
        idle = [actor.remote(stage, root) for _ in range(count)]
        running: dict[Any, tuple[Any, Job, int]] = {}
        while queue or running:
            while queue and idle:
                worker, (job, attempt) = idle.pop(), queue.pop()
                running[worker.run.remote(job)] = (worker, job, attempt)
            (ready,), _ = ray.wait(list(running), num_returns=1)
            worker, job, attempt = running.pop(ready)
            try:
                outcome: dict[str, Commit] | str = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, SettingError):
                    raise error.cause from None
                outcome = f"{type(error.cause).__name__}: {error.cause}"
            except ray.exceptions.RayError as error:
                outcome = f"worker died: {type(error).__name__}"
                worker = actor.remote(stage, root)
            idle.append(worker)
            if isinstance(outcome, str) and attempt < ATTEMPTS:
                queue.insert(0, (job, attempt + 1))
            else:
                yield job, outcome
    finally:
        ray.shutdown()


class _Worker:
    """An actor: opens the stage once, then makes shards."""

    def __init__(self, stage: Stage, root: str) -> None:
        self.work = stage.open(Store(root))

    def run(self, job: Job) -> dict[str, Commit]:
        return self.work(job)


def _start(workers: int | None, address: str | None):
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if address is not None and _has_token():
        # Ray 2.60 sends the token it has only in this mode, and joins in another by default.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import logging

    import ray
    import ray.exceptions

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is not None:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise SettingError(
                f"--address {address}: {first} (Ray asks for a token: set RAY_AUTH_TOKEN, or "
                "RAY_AUTH_TOKEN_PATH to its file; `ray get-auth-token` on the head prints it)"
            ) from error
        return ray
    # "local": a leftover session file would otherwise make Ray join a cluster that is gone.
    cpus = max(workers or 0, os.cpu_count() or 1)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    return ray


def _has_token() -> bool:
    """Whether Ray would find an authentication token: in the environment, or in its own file."""
    given = (os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return any(given) or Path.home().joinpath(".ray", "auth_token").is_file()

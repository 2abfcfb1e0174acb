"""Workers on a Ray cluster, and the shards in their hands: the only file that imports Ray.

The pool holds a bounded window of jobs, one in flight for each worker; a worker is an actor that
loads weights once and commits each shard itself, so nothing but counts travels through Ray. A
worker that dies costs its shard a retry.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.core import advance
from pipeline.core.commits import Commit, read_commit
from pipeline.core.errors import SettingError, StorageError, TooManyRejects
from pipeline.core.limits import raise_open_files, require_shared_memory, usable_cpus
from pipeline.core.stage import Job, Stage
from pipeline.core.store import Store, fingerprint
from pipeline.core.temporary import socket_folder
from pipeline.engine.plan import Choice
from pipeline.engine.report import Report

ATTEMPTS = 3  # of a shard, before it is reported as failed
OPEN_ATTEMPTS = 12  # workers in a row that die before they have opened the stage
GRACE_S = 12.0  # a stopped run lets the shards in hand finish this long; it must end within 20 s
LOOK_EVERY_S = 30.0  # for workers that the cluster has room for by now
GLANCE_EVERY_S = 1.0  # at how far shards in hand are
GLANCED_AT = 64  # shards in hand at most
_KV_S = 2.0  # without it Ray waits a minute for a store that is gone


@dataclass(frozen=True)
class Options:
    """How to run, none of which decides a byte."""

    workers: int | None = None  # default: the stage's own, or every CPU (or GPU, if it needs them)
    address: str | None = None  # a running Ray cluster; None starts a private one
    choice: Choice = field(default_factory=Choice)
    join: bool = False  # work beside another run of the same groups
    quota: int | None = None  # bytes that the root may hold
    shard_timeout_s: float | None = None  # a shard that takes longer is tried again
    dashboard: bool = False  # Ray's, on a private cluster
    command: str = ""  # what to tell others about this run


@dataclass(frozen=True)
class Made:
    commits: dict[str, Commit]
    made: bool  # by this worker; else another run had made it already
    counters: Counter[str]


@dataclass(frozen=True)
class Failure:
    error: str
    attempts: int


@dataclass
class _InHand:
    worker: Any
    job: Job
    attempt: int
    since: float


class Pool:
    """Workers, and the shards in their hands."""

    def __init__(
        self, ray: Any, stage: Stage, store: Store, options: Options, report: Report
    ) -> None:
        self.ray, self.options, self.report = ray, options, report
        self._needs = needs = stage.needs
        actor = ray.remote(
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            max_restarts=0,
            max_concurrency=needs.in_hand,
        )(_Worker)
        folder, again = os.getcwd(), options.choice.again()
        self._new = lambda: actor.remote(stage, store.root, folder, again)
        self._local = store.local
        self._opening: dict[Any, Any] = {}  # reference -> worker that loads its weights
        self._idle: list[Any] = []  # a worker for each shard more that it can take
        self._running: dict[Any, _InHand] = {}
        self._dead: set[Any] = set()
        self._opening_failed = 0
        self._looked = 0.0
        self._glanced = 0.0

    def outcomes(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Made | Failure] | None]:
        """(job, what became of it) as they finish; None at least each second."""
        again: deque[tuple[Job, int]] = deque()
        waiting = next(jobs, None)
        deadline = None
        while waiting or again or self._running:
            if self.report.stopped:
                deadline = deadline or time.monotonic() + GRACE_S
                if not self._running or time.monotonic() > deadline:
                    return
            else:
                self._grow()
                while self._idle and (again or waiting):
                    if again:
                        self._submit(*again.popleft())
                    elif waiting:
                        self._submit(waiting, 1)
                        waiting = next(jobs, None)
            references = [*self._running, *self._opening]
            ready, _ = self.ray.wait(references, num_returns=1, timeout=0.5)
            for reference in ready:
                if reference in self._opening:
                    self._opened(reference)
                    continue
                hand = self._running.pop(reference)
                self.report.in_hand.pop(hand.job.shard.id, None)
                found = self._outcome(reference, hand)
                if isinstance(found, Failure) and found.attempts < ATTEMPTS:
                    if not self.report.stopped:
                        self.report.retries += 1
                        again.append((hand.job, hand.attempt + 1))
                else:
                    yield hand.job, found
            self._kill_late()
            self._look_into_shards()
            yield None

    def close(self) -> None:
        for worker in self._workers() | set(self._opening.values()):
            self.ray.kill(worker)
            if self.options.address is not None:  # a private cluster's store ends with it
                _gcs().internal_kv_del(_board(worker._actor_id.hex()), False, None, timeout=_KV_S)

    def _grow(self) -> None:
        """As many workers as asked for, or as the cluster has room for: it may grow or shrink."""
        now = time.monotonic()
        if self._looked and now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        total = self.ray.cluster_resources()
        room = total.get("CPU", 1) / self._needs.cpus
        if self._needs.gpus:
            room = min(room, total.get("GPU", 0) / self._needs.gpus)
            if not room and self.options.address is None:
                raise SettingError(
                    "device=cuda: this machine offers Ray no GPU; use --device cpu, or --address "
                    "of a cluster that has some"
                )
        here = len(self._workers()) + len(self._opening)
        wanted = self.options.workers or self._needs.workers or max(1, int(room))
        for _ in range(min(wanted, self.report.total) - here):
            self._open()

    def _open(self) -> None:
        worker = self._new()
        self._opening[worker.open.remote()] = worker

    def _opened(self, reference: Any) -> None:
        worker = self._opening.pop(reference)
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (SettingError, StorageError)):
                raise error.cause from None
            raise RuntimeError(f"a worker could not open {self.report.stage}: {error}") from None
        except self.ray.exceptions.RayError as error:
            self._opening_failed += 1
            if self._opening_failed >= OPEN_ATTEMPTS:
                address = self.options.address
                remedy = (
                    f"; if the cluster at {address} uses no token, set RAY_AUTH_MODE=disabled"
                    if address is not None and os.environ.get("RAY_AUTH_MODE") == "token"
                    else "; Ray's logs under /tmp/ray/session_latest/logs may say why"
                )
                raise SettingError(
                    f"{OPEN_ATTEMPTS} workers in a row died as they started "
                    f"({type(error).__name__}){remedy}"
                ) from None
            self._open()
            return
        self._opening_failed = 0
        for _ in range(self._needs.in_hand):
            self._free(worker)
        self._count()

    def _submit(self, job: Job, attempt: int) -> None:
        worker = self._idle.pop()
        reference = worker.run.remote(job)
        self._running[reference] = _InHand(worker, job, attempt, time.monotonic())

    def _outcome(self, reference: Any, hand: _InHand) -> Made | Failure:
        attempts = hand.attempt
        try:
            found = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            self._free(hand.worker)
            cause = error.cause
            if isinstance(cause, SettingError):
                raise cause from None
            if isinstance(cause, StorageError) and (self._local or attempts >= ATTEMPTS):
                raise cause from None
            if isinstance(cause, TooManyRejects):
                attempts = ATTEMPTS  # the same samples will be rejected again
            return Failure(f"{type(cause).__name__}: {cause}", attempts)
        except self.ray.exceptions.RayError as error:
            self._lost(hand.worker)
            return Failure(f"worker died: {type(error).__name__}", attempts)
        self._free(hand.worker)
        return found

    def _free(self, worker: Any) -> None:
        """It can take one more shard: before others if it has none, after them if it has."""
        if worker in self._dead:
            return
        busy = worker in self._idle or any(h.worker == worker for h in self._running.values())
        self._idle.insert(0 if busy else len(self._idle), worker)

    def _lost(self, worker: Any) -> None:
        """Another takes its place, once, however many shards it had in hand."""
        if worker in self._dead:
            return
        self._dead.add(worker)
        self._idle = [other for other in self._idle if other != worker]
        if not self.report.stopped:
            self._open()
        self._count()

    def _workers(self) -> set[Any]:
        return {*self._idle, *(h.worker for h in self._running.values())} - self._dead

    def _kill_late(self) -> None:
        limit = self.options.shard_timeout_s
        for hand in self._running.values():
            if limit is not None and time.monotonic() - hand.since > limit:
                self.ray.kill(hand.worker)

    def _look_into_shards(self) -> None:
        """How far those in hand have come. Of many workers shards are finished often enough."""
        now = time.monotonic()
        if now - self._glanced < GLANCE_EVERY_S or len(self._running) > GLANCED_AT:
            return
        if self.report.stopped:  # a signal to the whole group has ended a private cluster's store
            return
        self._glanced = now
        self.report.in_hand = {}
        for hand in self._running.values():
            board = _board(hand.worker._actor_id.hex())
            try:
                found = _gcs().internal_kv_get(board, None, timeout=_KV_S)
            except self.ray.exceptions.RayError:  # what is wrong with Ray, the workers tell
                return
            seen = json.loads(found).get(hand.job.shard.id) if found else None
            if seen:
                self.report.in_hand[hand.job.shard.id] = (seen, hand.job.samples)

    def _count(self) -> None:
        self.report.workers = len(self._workers())


class _Worker:
    """An actor: opens the stage once, then makes shards."""

    def __init__(self, stage: Stage, root: str, folder: str, again: bool) -> None:
        self.stage, self.root, self.folder, self.again = stage, root, folder, again

    def open(self) -> None:
        from ray.util.metrics import Counter as Metric

        raise_open_files()
        # Relative paths are those of the folder in which the command was given. Where a node has no
        # such folder they lead nowhere, rather than into that of whoever started Ray there.
        os.chdir(self.folder if os.path.isdir(self.folder) else os.sep)
        self.store = Store(self.root)
        self.work = self.stage.open(self.store)
        tags = {"stage": self.stage.name, "source": self.stage.source}
        self._metrics = {
            name: Metric(f"pipeline_{name}", text, tuple(tags)) for name, text in _METRICS.items()
        }
        for metric in self._metrics.values():
            metric.set_default_tags(tags)
        threading.Thread(target=self._post, name="progress", daemon=True).start()

    def _post(self) -> None:
        """Says how far the shards in hand are, where the driver can look."""
        import ray

        board = _board(str(ray.get_runtime_context().get_actor_id()))
        posted: dict[str, int] = {}
        while True:
            time.sleep(GLANCE_EVERY_S)
            if (seen := advance.seen()) != posted:
                posted = seen
                _gcs().internal_kv_put(board, json.dumps(seen).encode(), True, None)

    def run(self, job: Job) -> Made:
        wanted = job if self.again else self._left(job)
        if not wanted.groups:
            return Made({}, False, Counter())
        try:
            commits = self.work(wanted)
        finally:
            advance.finished(job.shard.id)
        counted = {
            "shards": 1,
            "samples": min(commit.samples for commit in commits.values()),
            "rejects": sum(sum(commit.rejects.values()) for commit in commits.values()),
            "bytes": sum(commit.bytes() for commit in commits.values()),
        }
        for name, count in counted.items():
            if count:
                self._metrics[name].inc(count)
        return Made(commits, True, self.work.take_counters())

    def _left(self, job: Job) -> Job:
        """Without what another run, or an orphan of a dead one, has committed since the plan."""
        left = {}
        for group, inputs in job.groups.items():
            commit = read_commit(self.store, group, job.shard.id)
            if commit is None or commit.fingerprint != fingerprint(inputs):
                left[group] = inputs
        return replace(job, groups=left)


#: Counters in Ray's dashboard and Prometheus, as ray_pipeline_NAME_total, by stage and source.
_METRICS = {
    "shards": "Shards committed.",
    "samples": "Samples committed.",
    "rejects": "Samples rejected.",
    "bytes": "Bytes written.",
}


def _board(actor: str) -> bytes:
    """Where a worker posts: a key of the cluster's own store. A call would wait for its shard, and
    an actor with threads for calls would not compute in the thread that its stage was opened in."""
    return f"microdit-in-hand:{actor}".encode()


def _gcs() -> Any:
    from ray.experimental import internal_kv

    return internal_kv.global_gcs_client


def start(options: Options, announce: Callable[[str], None]) -> Any:
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if options.address is not None and _has_token():
        # Ray 2.60 sends the token it has only in this mode, and joins in another by default.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import logging

    import ray
    import ray.exceptions

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if options.address is not None:
        try:
            ray.init(address=options.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise SettingError(
                f"--address {options.address}: {first} (Ray asks for a token: set RAY_AUTH_TOKEN, "
                "or RAY_AUTH_TOKEN_PATH to its file; `ray get-auth-token` on the head prints it)"
            ) from error
        return ray
    # "local": a leftover session file would otherwise make Ray join a cluster that is gone.
    cpus = max(options.workers or 0, usable_cpus())
    folder = _session_folder()
    require_shared_memory()
    if not _has_token() and not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray would write one into the home
    try:
        context = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=options.dashboard,
            _temp_dir=folder,
            **quiet,
        )
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingError(
            f"Ray cannot start on this machine: {first}; its logs under "
            f"{folder}/session_latest/logs may say more"
        ) from error
    if options.dashboard:
        announce(f"Ray's dashboard: http://{context.dashboard_url}")
    return ray


def _session_folder() -> str:
    """Where a private cluster keeps sockets and logs."""
    if given := os.environ.get("RAY_TMPDIR"):
        return os.path.join(given, "ray")
    example = "/ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.12"
    return os.path.join(socket_folder(len(example)), "ray")


def _has_token() -> bool:
    """Whether Ray would find an authentication token: in the environment, or in its own file."""
    given = (os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return any(given) or os.path.isfile(os.path.expanduser("~/.ray/auth_token"))

"""One run at a time over a group, to save work, not to protect it: commits are atomic and equal.

A lease is a small file in <group>/leases/ whose counter its owner raises. Nothing compares clocks:
an observer watches the counter on its own clock, and a lease that stands still is dead. So is one
whose process has gone from this host, at once.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

from pipeline.core import process
from pipeline.core.errors import SettingError, StorageError
from pipeline.core.store import Store, canonical_json

BEAT_S = 2.0
JOIN = "wait for it, or work beside it with --join"  # what a run is told that finds another
WAIT = "wait for it, or stop it"  # and a command that must be alone
_NAME = re.compile(r".+-\d+-\w*\.json")  # of a lease: host, process and its start
PATIENCE_S = 8.0  # four beats; with taking it, a rerun after a kill on another host waits 10 s


class Holding:
    """What a run holds; `lost` says who took it for dead, and took it over: "" as long as none."""

    def __init__(self, store: Store, groups: list[str], me: str, command: str) -> None:
        self.lost = ""
        self._store = store
        self._paths = [f"{_folder(group)}/{me}.json" for group in groups]
        self._groups = groups
        self._me = me
        self._command = command
        self._count = 0
        self._settled = False
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self) -> None:
        """Shows the lease, and keeps it alive; it does not count as held before `settle`."""
        self._write()
        self._thread.start()

    def settle(self) -> None:
        """From here on everybody else has to wait."""
        self._settled = True
        self._write()

    def release(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(StorageError):
            for group, path in zip(self._groups, self._paths, strict=True):
                self._store.delete(path)
                self._store.remove_empty(_folder(group))

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(StorageError):  # the run itself will say so
                if not self._is_taken_over():
                    self._write()

    def _is_taken_over(self) -> bool:
        if self._settled and not self._store.exists(self._paths[0]):
            for path, record in _others(self._store, self._groups[:1], self._me):
                self.lost = _refusal(self._store, path, record)
        return bool(self.lost)

    def _write(self) -> None:
        with self._writing:
            self._count += 1
            record = {
                "owner": self._me,
                "command": self._command,
                "counter": self._count,
                "settled": self._settled,
            }
            for path in self._paths:
                if not self._stop.is_set():
                    self._store.write(path, canonical_json(record))


@contextlib.contextmanager
def held(
    store: Store, groups: list[str], command: str, join: bool = False, remedy: str = JOIN
) -> Iterator[Holding]:
    """Holds the groups while the block runs.

    Args:
        groups: folders; "" is the root itself.
        command: what to tell others about this run; queries and users of its links are left out.
        join: do not mind others who hold them.
        remedy: what the user can do where another holds them.

    Raises:
        SettingError: another run holds one of them.
    """
    me = process.identity()
    holding = Holding(store, sorted(groups), me, _without_secrets(command))
    try:
        holding.take()  # before looking, so that of two that start together at least one sees
        if not join:
            refuse_if_held(store, groups, me, remedy)
        holding.settle()
        yield holding
    finally:
        holding.release()


def refuse_if_held(store: Store, groups: list[str], me: str = "", remedy: str = JOIN) -> None:
    """Waits until every other lease is known to be dead, and removes it. Of several that start at
    once the one whose name is the lowest waits until the others have given way.

    Raises:
        SettingError: one of them lives; names who holds it and what to do.
    """
    watched: dict[str, tuple[bytes, float]] = {}
    while True:
        waiting = False
        for path, record in _others(store, groups, me):
            who, now = _owner(path), time.monotonic()
            first, since = watched.setdefault(path, (record, now))
            late = now - since > PATIENCE_S
            lives = record != first or (process.is_here(who) and not process.is_dead(who))
            gives_way = me and who > me and not late and not _is_settled(record)
            if lives and not gives_way:
                raise SettingError(f"{_refusal(store, path, record)}; {remedy}")
            if process.is_dead(who) or late:
                store.delete(path)
            else:
                waiting = True
        if not waiting:
            return
        time.sleep(0.2 if store.local else 1.0)


def _folder(group: str) -> str:
    return f"{group}/leases".lstrip("/")


def _owner(path: str) -> str:
    return path.rsplit("/", 1)[1].removesuffix(".json")


def _others(store: Store, groups: list[str], me: str) -> Iterator[tuple[str, bytes]]:
    for group in sorted(groups):
        for name in store.names(_folder(group)):
            if name != f"{me}.json" and _NAME.fullmatch(name):
                path = f"{_folder(group)}/{name}"
                with contextlib.suppress(FileNotFoundError):  # released a moment ago
                    yield path, store.read(path)


def _record(data: bytes) -> dict[str, Any]:
    """Empty where it was not written whole."""
    try:
        record = json.loads(data)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _is_settled(record: bytes) -> bool:
    return _record(record).get("settled", True)  # older versions write no such thing


def _refusal(store: Store, path: str, record: bytes) -> str:
    host, pid, _ = _owner(path).rsplit("-", 2)
    group = path.rpartition("leases/")[0].rstrip("/") or store.root
    return (
        f"{group} is being written by process {pid} on {host.rpartition('.')[0] or host} "
        f"({_record(record).get('command', 'of which nothing is known')})"
    )


def _without_secrets(command: str) -> str:
    """The command whose links have neither query (it may be a signature) nor user and password."""
    command = re.sub(r"://[^\s/@'\"]*@", "://", command)
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1", command)

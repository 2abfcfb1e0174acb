"""One run at a time over a group, to save work, not to protect it: commits are atomic and equal.

A lease is a small file in <group>/leases/ whose counter its owner raises. Nothing compares clocks:
an observer watches the counter on its own clock, and a lease that stands still is dead. So is one
whose process has gone from this host, at once.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator

from pipeline.core import process
from pipeline.core.errors import SettingError, StorageError
from pipeline.core.store import Store, canonical_json

BEAT_S = 2.0
JOIN = "wait for it, or work beside it with --join"  # what a run is told that finds another
WAIT = "wait for it, or stop it"  # and a command that must be alone
PATIENCE_S = 8.0  # four beats; with taking it, a rerun after a kill on another host waits 10 s


@contextlib.contextmanager
def held(
    store: Store, groups: list[str], command: str, join: bool = False, remedy: str = JOIN
) -> Iterator[None]:
    """Holds the groups while the block runs.

    Args:
        command: what to tell others about this run; queries and users of its links are left out.
        join: do not mind others who hold them.
        remedy: what the user can do where another holds them.

    Raises:
        SettingError: another run holds one of them.
    """
    me = process.identity()
    shown = _without_secrets(command)
    stop = threading.Event()
    paths = [f"{group}/leases/{me}.json" for group in sorted(groups)]
    count = 0

    def beat() -> None:
        while not stop.wait(BEAT_S):
            with contextlib.suppress(StorageError):  # the run itself will say so
                raise_counter()

    def raise_counter() -> None:
        nonlocal count
        count += 1
        record = canonical_json({"owner": me, "command": shown, "counter": count})
        for path in paths:
            if not stop.is_set():
                store.write(path, record)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    try:
        raise_counter()  # before looking, so that of two that start together at least one sees
        if not join:
            refuse_if_held(store, groups, me, remedy)
        thread.start()
        yield
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()
        with contextlib.suppress(StorageError):
            for group, path in zip(sorted(groups), paths, strict=True):
                store.delete(path)
                store.remove_empty(f"{group}/leases")


def refuse_if_held(store: Store, groups: list[str], me: str = "", remedy: str = JOIN) -> None:
    """Waits until every other lease is known to be dead, and removes it.

    Raises:
        SettingError: one of them lives; names who holds it and what to do.
    """
    watched: dict[str, bytes] = {}
    deadline = time.monotonic() + PATIENCE_S
    while True:
        waiting = False
        for path, record in _others(store, groups, me):
            who = path.rsplit("/", 1)[1].removesuffix(".json")
            if watched.setdefault(path, record) != record or _lives_here(who):
                raise SettingError(f"{_refusal(path, who, record)}; {remedy}")
            if process.is_dead(who) or time.monotonic() > deadline:
                store.delete(path)
            else:
                waiting = True
        if not waiting:
            return
        time.sleep(0.2 if store.local else 1.0)


def _others(store: Store, groups: list[str], me: str) -> Iterator[tuple[str, bytes]]:
    for group in sorted(groups):
        for name in store.names(f"{group}/leases"):
            if name != f"{me}.json":
                path = f"{group}/leases/{name}"
                with contextlib.suppress(FileNotFoundError):  # released a moment ago
                    yield path, store.read(path)


def _lives_here(who: str) -> bool:
    return process.is_here(who) and not process.is_dead(who)


def _refusal(path: str, who: str, record: bytes) -> str:
    import json

    host, pid, _ = who.rsplit("-", 2)
    command = json.loads(record)["command"]
    group = path.rsplit("/leases/", 1)[0]
    return (
        f"{group} is being written by process {pid} on {host.rpartition('.')[0] or host} "
        f"({command})"
    )


def _without_secrets(command: str) -> str:
    """The command whose links have neither query (it may be a signature) nor user and password."""
    command = re.sub(r"://[^\s/@'\"]*@", "://", command)
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1", command)

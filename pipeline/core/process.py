"""Who is writing: the identity of a process, and whether it still lives.

A process id alone is not enough: ids are reused, and containers on one host count their own.
"""

from __future__ import annotations

import functools
import os
import re
import socket
from pathlib import Path


@functools.cache
def host() -> str:
    """This machine and process-id namespace, as one word of letters, digits, "_" and "."."""
    name = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())
    try:
        return f"{name}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no /proc: not Linux
        return name


def identity(pid: int | None = None) -> str:
    """host-pid-start of a living process, this one by default."""
    pid = os.getpid() if pid is None else pid
    return f"{host()}-{pid}-{_started(pid)}"


def is_dead(who: str) -> bool:
    """Whether a process is known to be gone. False for one on another host: nobody here can say."""
    where, pid, started = who.rsplit("-", 2)
    return where == host() and _started(int(pid)) != started


def is_here(who: str) -> bool:
    return who.rsplit("-", 2)[0] == host()


def _started(pid: int) -> str:
    """The kernel's start time of a process, in clock ticks since boot; "" where it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "" if Path("/proc").is_dir() else "unknown"
    # The command's name, in parentheses, may hold anything; the fields after it do not.
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]

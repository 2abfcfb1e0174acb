"""What this process may use of the machine: CPUs, open files, shared memory."""

from __future__ import annotations

import contextlib
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import SettingError

SHM = Path("/dev/shm")
OPEN_FILES = 65_536  # at once, where the limit allows it; usual is 1,024


def usable_cpus(proc: Path = Path("/proc/self/cgroup"), sys: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: those it may run on, or fewer where a cgroup gives it a share
    of their time, as `docker run --cpus` and Kubernetes' limits do. Part of one counts as one."""
    return max(1, min([allowed_cpus(), *map(math.ceil, _quotas(proc, sys))]))


def allowed_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not Linux


def _quotas(proc: Path, sys: Path) -> Iterator[float]:
    """CPUs' worth of time that this process's cgroups and those above them leave it, version 1 or
    2, where there is a limit."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts, read = [sys, sys / "unified"], _version_2
        elif "cpu" in controllers.split(","):
            mounts, read = [sys / "cpu", sys / controllers], _version_1
        else:
            continue
        # A container may see its own cgroup as the root of a tree, and still the host's path to it.
        inner = Path(path.strip("/"))
        for mount in mounts:
            for folder in (inner, *inner.parents):
                with contextlib.suppress(OSError, ValueError):
                    yield from read(mount / folder)


def _version_1(folder: Path) -> list[float]:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    period = int((folder / "cpu.cfs_period_us").read_text())
    return [quota / period] if quota > 0 else []


def _version_2(folder: Path) -> list[float]:
    quota, period = (folder / "cpu.max").read_text().split()
    return [] if quota == "max" else [int(quota) / int(period)]


def require_shared_memory() -> None:
    """Ray's objects and the trainer's batches lie there.

    Raises:
        SettingError: /dev/shm is missing.
    """
    if Path("/proc").is_dir() and not SHM.is_dir():  # else not Linux
        raise SettingError(
            f"{SHM} is missing, which processes share memory through; mount it (`mount -t tmpfs "
            f"tmpfs {SHM}`; in a container: docker run --shm-size=1g)"
        )


def raise_open_files() -> None:
    """As many files open at once as the hard limit allows, to OPEN_FILES: a run over thousands of
    shards has more than the usual soft limit. Processes started from here have it too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

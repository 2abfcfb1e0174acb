"""A measured claim, and how rows of them are printed."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

REPEATS = 3


@dataclass(frozen=True)
class Row:
    claim: str
    measured: str
    wanted: str  # what the project asks for; "" for a figure that is only told
    met: bool = True


def show(rows: Iterable[Row]) -> None:
    """A Markdown table, a row as soon as it is measured."""
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}\n")
    print("| claim | measured | wanted | |\n|---|---|---|---|", flush=True)
    for row in rows:
        verdict = "met" if row.met else "**missed**"
        print(f"| {row.claim} | {row.measured} | {row.wanted} | {verdict} |", flush=True)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def median(run: Callable[[], float], repeats: int = REPEATS) -> float:
    return statistics.median(run() for _ in range(repeats))

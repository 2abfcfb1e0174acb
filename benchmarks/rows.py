"""A measured claim, and how rows of them are printed and kept."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

REPEATS = 5  # the median of these


@dataclass(frozen=True)
class Row:
    claim: str
    measured: str
    wanted: str  # what the project asks for; "" for a figure that is only told
    met: bool = True


def show(rows: Iterable[Row], target: Path) -> None:
    """Prints a Markdown table, a row as soon as it is measured, and writes all of them as JSON."""
    print(f"{machine()}\n")
    print("| claim | measured | wanted | |\n|---|---|---|---|", flush=True)
    kept = []
    for row in rows:
        verdict = "met" if row.met else "**missed**"
        print(f"| {row.claim} | {row.measured} | {row.wanted} | {verdict} |", flush=True)
        kept.append(asdict(row))
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "rows": kept}
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {target}")


def machine() -> str:
    """ "AMD EPYC 9B14, 2 cores"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(
            line.split(":")[1].strip() for line in text.splitlines() if "model name" in line
        )
    except (OSError, StopIteration):
        name = "unknown processor"
    return f"{name}, {os.cpu_count()} cores"


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def median(run: Callable[[], float], repeats: int = REPEATS) -> float:
    return statistics.median(run() for _ in range(repeats))

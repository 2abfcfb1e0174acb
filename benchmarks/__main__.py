"""Runs the benchmarks that are named, or all: `python -m benchmarks control overhead`."""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path

from benchmarks.rows import show

#: Name -> function that yields rows.
BENCHMARKS = {
    "caption": "benchmarks.caption:rows",
    "control": "benchmarks.control:rows",
    "decode": "benchmarks.decode:rows",
    "encode": "benchmarks.encode:rows",
    "endpoint": "benchmarks.endpoint:rows",
    "loader": "benchmarks.loader:rows",
    "model": "benchmarks.model:rows",
    "overhead": "benchmarks.overhead:rows",
    "size": "benchmarks.size:rows",
    "text": "benchmarks.text:rows",
    "urls": "benchmarks.urls:rows",
}


def main() -> None:
    names = sys.argv[1:] or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            sys.exit(f"bench: no benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    rows = (row for name in names for row in pkgutil.resolve_name(BENCHMARKS[name])())
    show(rows, Path("out", "bench.json"))


if __name__ == "__main__":
    main()

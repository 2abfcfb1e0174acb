"""Runs the benchmarks that are named, or all: `python -m tests.bench control overhead`."""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path

from tests.bench.rows import show

#: Name -> function that yields rows.
BENCHMARKS = {
    "caption": "tests.bench.caption:rows",
    "control": "tests.bench.control:rows",
    "decode": "tests.bench.decode:rows",
    "encode": "tests.bench.encode:rows",
    "endpoint": "tests.bench.endpoint:rows",
    "loader": "tests.bench.loader:rows",
    "model": "tests.bench.model:rows",
    "overhead": "tests.bench.overhead:rows",
    "size": "tests.bench.size:rows",
    "text": "tests.bench.text:rows",
    "urls": "tests.bench.urls:rows",
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

"""<stage>/metrics.jsonl: a JSON object for each step of a stage, in order, every step once.

Keys are those that loggers get, e.g. {"step": 200, "train/loss": 0.61, "eval/ema/mean": 0.58}. A
run that was killed, or rolled back, goes on from a checkpoint: the lines after it are cut off and
written again.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Journal:
    """Collects the values of the steps since the last `write`, and appends them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[int, dict[str, Any]] = {}

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Values of one step; numbers that JSON cannot hold become null."""
        row = self._rows.setdefault(step, {"step": step})
        row.update({key: _plain(value) for key, value in values.items()})

    def write(self) -> None:
        """Appends what was collected."""
        if self._rows:
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in self._rows.values())
            self._rows = {}

    def cut(self, step: int) -> None:
        """Removes the lines after this step, and one that a kill left half-written."""
        self._rows = {}
        if not self._path.exists():
            return
        kept = 0
        with open(self._path, "rb") as file:
            for line in file:
                row = _parse(line)
                if row is None or row["step"] > step:
                    break
                kept += len(line)
        with open(self._path, "r+b") as file:
            file.truncate(kept)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; none where there is no file."""
    if not path.exists():
        return []
    rows = map(_parse, path.read_bytes().splitlines(keepends=True))
    return [row for row in rows if row is not None]


def last(path: Path, key: str) -> float | None:
    """The last value on record of one key."""
    values = (row[key] for row in reversed(read(path)) if row.get(key) is not None)
    return next(values, None)


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for a line that was not written to its end."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

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

from pipeline.core.store import Store


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

    def cut(self, step: int) -> int:
        """Removes the lines after this step, and those that are none: a kill leaves one
        half-written, and a damaged file may have others.

        Returns:
            How many lines that are none stood before others.
        """
        self._rows = {}
        if not self._path.exists():
            return 0
        lines = self._path.read_bytes().splitlines(keepends=True)
        rows = [_parse(line) for line in lines]
        kept = [
            line
            for line, row in zip(lines, rows, strict=True)
            if row is not None and row["step"] <= step
        ]
        if len(kept) < len(lines):
            Store(self._path.parent).write(self._path.name, b"".join(kept))
        return rows[:-1].count(None)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, without those that are none; nothing where there is no file."""
    if not path.exists():
        return []
    rows = map(_parse, path.read_bytes().splitlines(keepends=True))
    return [row for row in rows if row is not None]


def last(path: Path, key: str) -> float | None:
    """The last value on record of one key."""
    values = (row[key] for row in reversed(read(path)) if row.get(key) is not None)
    return next(values, None)


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for what is no line of a journal: one that was not written to its end, or damaged."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(_is_number(value) for value in row.values()) else None


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What readers of tars and of zips share: limits, errors, and how a member is handed on."""

from __future__ import annotations

from collections.abc import Callable

MEMBER_BYTES = 64 << 20  # a larger member is refused: that is all that is held in memory
RATIO = 200  # an archive that expands by more is a bomb; text comes to 20, and gzip's limit is 1030
RATIO_FROM = 64 << 20  # expanded bytes below which no ratio is a danger


class BrokenArchive(RuntimeError):
    """An archive that is not whole, not what it says, or a bomb; no sample of it is used."""


class BadMember(Exception):
    """One member cannot be read; those after it can be."""


Problem = tuple[str, str] | None  # reason and detail of a reject
Entry = tuple[str, Problem, Callable[[], bytes]]  # name, why it is refused, and what reads it


def too_large(size: int, limit: int) -> Problem:
    return ("too-large", f"{size} bytes, over {limit}") if size > limit else None

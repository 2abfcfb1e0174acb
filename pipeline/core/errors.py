"""Errors with a remedy, of which commands print the message alone, and what each does to a run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SettingError(ValueError):
    """A setting that cannot be used: name, value, remedy. The command ends with exit 2."""


class NewerSchema(SettingError):
    """A file that a newer version of this package wrote: nothing is wrong with it."""


class StorageError(RuntimeError):
    """A root that cannot be read or written: full, read-only, forbidden, unreachable.

    It concerns every shard alike, so a run stops at it, with exit 1; rerunning goes on.
    """


class BadPicture(Exception):
    """A picture that cannot be used: `reason` groups it, the message says what happened."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class BrokenShard(RuntimeError):
    """A committed file that is gone, damaged, or differs from its record. It concerns its shard
    alone; where it ends a command or a training, with exit 1."""


class TooManyRejects(RuntimeError):
    """A shard whose samples were nearly all rejected: an outage or a wrong setting, not bad
    pictures. It is not committed, so that a rerun tries again."""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the nearest known word, or '' where none is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{match[0]}"?' if match else ""

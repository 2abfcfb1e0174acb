"""Errors that a person can mend: one line that names the setting, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SettingError(ValueError):
    """A setting that cannot be used. Commands print the message alone and exit 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the nearest known word, or '' where none is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{match[0]}"?' if match else ""

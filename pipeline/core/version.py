"""What `--version` says, of every command."""

from __future__ import annotations

from importlib.metadata import version


def version_line() -> str:
    return f"microdit {version('microdit')}"

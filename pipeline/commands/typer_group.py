"""A command group that answers a mistyped command with the nearest one, and options that are
paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import typer.core

from pipeline.core.errors import SettingError, nearest
from pipeline.core.location import located

T = TypeVar("T", str, Path)


def path_option(value: T | None) -> T | None:
    """The callback of an option that may be a path: `--root=~/data` means the home's data."""
    return None if value is None else type(value)(located(str(value)))


class Commands(typer.core.TyperGroup):
    def resolve_command(self, ctx, args):
        if args and args[0] not in self.commands:
            raise SettingError(
                f"unknown command {args[0]!r}{nearest(args[0], self.commands)}; "
                f"known: {', '.join(self.commands)} (see `{ctx.command_path} --help`)"
            )
        return super().resolve_command(ctx, args)


OPTIONS: dict[str, Any] = {
    "cls": Commands,
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

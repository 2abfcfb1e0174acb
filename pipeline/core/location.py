"""Paths and URLs as people write them in settings."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator

from pipeline.core.errors import SettingError


def located(text: str) -> str:
    """As given, but `~` at the beginning is the user's home, as a shell would have it: in a YAML
    file, in `KEY=~/…` and in quotes no shell puts it there.

    Raises:
        SettingError: this user has no home.
    """
    scheme = "file://" if text.startswith("file://") else ""
    found = os.path.expanduser(text.removeprefix(scheme))
    if found.split("/")[0] == "~":
        raise SettingError(f"{text}: uid {os.getuid()} has no home folder; write the whole path")
    return scheme + found


#: The type of every setting that may be a path: of a file or folder, a URL, or a name of a table.
Location = Annotated[str, AfterValidator(located)]

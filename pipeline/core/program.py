"""What every command does first."""

from __future__ import annotations

import getpass
import os

from pipeline.core.limits import raise_open_files
from pipeline.core.streams import survive_readers


def begin() -> None:
    """Makes the process fit for odd surroundings: a reader that goes away, a low limit of open
    files, a user whom the system does not know."""
    survive_readers()
    raise_open_files()
    name_user()


def name_user() -> None:
    """Torch asks who runs it when it is imported, and fails where nobody can say: a container's uid
    that /etc/passwd does not have."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"

"""The folder for temporary files, and where sockets go if its name is too long for them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from multiprocessing.util import Finalize

from pipeline.core.errors import SettingError

LONGEST = 107  # bytes of a socket's path, in Linux's sockaddr_un


def temporary_folder() -> str:
    """
    Raises:
        SettingError: there is none that can be written.
    """
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise SettingError(
            f"no folder for temporary files can be written ({error.strerror}); set TMPDIR to one"
        ) from error


def socket_folder(room: int) -> str:
    """A temporary folder short enough for sockets whose paths go on for `room` bytes: the usual
    one, or /tmp.

    Raises:
        SettingError: neither will do.
    """
    usual = temporary_folder()
    for folder in (usual, "/tmp"):
        if len(os.fsencode(folder)) + room <= LONGEST and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise SettingError(
        f"TMPDIR={usual}: too long for a socket's path, which has {LONGEST} bytes, and /tmp cannot "
        f"be written; give one of {LONGEST - room} at most"
    )


def shorten_sockets() -> None:
    """Loader processes send tensors through sockets: in a short folder where TMPDIR is long.
    Python does so by itself from 3.14 on."""
    folder = socket_folder(len("/pymp-12345678/listener-12345678"))
    if folder != temporary_folder():
        own = tempfile.mkdtemp(prefix="pymp-", dir=folder)
        Finalize(None, shutil.rmtree, args=(own, True), exitpriority=-100)  # as Python's own
        multiprocessing.current_process()._config["tempdir"] = own  # pyright: ignore

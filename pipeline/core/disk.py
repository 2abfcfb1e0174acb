"""What file systems do differently: exFAT, SMB and some of FUSE sync no folder and know no second
name of a file. They get the next best thing, and the user is told once."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import sys
from pathlib import Path

#: How file systems say that they cannot do a thing, whoever asks and whatever is free.
_UNABLE = {
    *(errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EISDIR),
    *(errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV),
}


def sync_folder(folder: Path) -> None:
    """Names that files got in it survive a power cut from here on, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        _say(
            folder, "sync folders, so a power cut may take the last files; run the same again then"
        )


def second_name(target: Path, name: Path) -> None:
    """The same file under another name, which must be free; a copy where there are no links."""
    try:
        os.link(target, name)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        shutil.copyfile(target, name)
        _say(target.parent, "give files a second name, so there are copies")


def _say(folder: Path, what: str) -> None:
    _say_once(os.stat(folder).st_dev, f"{folder}: its file system cannot {what}")


@functools.cache
def _say_once(device: int, line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Standard output and error that nobody may be reading any more."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO


class _Stream(io.FileIO):
    """What is written to a reader that is gone (`| head`, a closed terminal) is lost, and nothing
    else is: no run of days ends for the sake of its log.

    Args:
        lost: errors that lose what was to be written; None for all of them.
    """

    def __init__(self, file: int, name: str, lost: tuple[int, ...] | None) -> None:
        super().__init__(file, "w", closefd=False)
        self.name = name  # pyright: ignore
        self._lost = lost

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self._lost is not None and error.errno not in self._lost:
                raise
            return memoryview(data).nbytes


def survive_readers() -> None:
    """From here on a standard stream that is closed, or whose reader is gone, ends nothing.

    For a program's start alone. A full disk under standard output is still an error, as what is
    printed there may be the result; under standard error it is not.
    """
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        return  # somebody reads what this process prints
    for file in (0, 1, 2):  # or the next file that is opened gets its number, and what is printed
        try:
            os.fstat(file)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _replaced(sys.stdout, 1, "<stdout>", (errno.EPIPE, errno.EIO))
    sys.stderr = _replaced(sys.stderr, 2, "<stderr>", None)


def _replaced(stream: TextIO | None, file: int, name: str, lost: tuple[int, ...] | None) -> TextIO:
    if stream is not None:
        stream.flush()
    settings = stream if isinstance(stream, io.TextIOWrapper) else None
    return io.TextIOWrapper(
        io.BufferedWriter(_Stream(file, name, lost)),
        encoding=settings.encoding if settings else "utf-8",
        # Not "strict": a terminal that knows no "·", and file names that are no text, are shown.
        errors=settings.errors if settings and settings.errors != "strict" else "backslashreplace",
        line_buffering=settings.line_buffering if settings else True,
        write_through=settings.write_through if settings else False,
    )

"""Composer's launcher, patient: `python -m training.launch -n 8 training/train.py FILE.yaml …`.

Arguments, output and exit codes are those of `composer`. That one kills its ranks 30 s after it got
SIGTERM, which is less than a checkpoint of a large network may take to be written; and it answers
Ctrl-C, or a stray WORLD_SIZE, with a traceback.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
from typing import Any

from pipeline.core import program
from pipeline.core.errors import SettingError
from training import ranks

PATIENCE = datetime.timedelta(minutes=15)
"""From SIGTERM on; whoever sent it has a limit of his own. Ranks that hang because another one
crashed get Composer's 30 s."""

INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended
READ = ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "BASE_RANK", "NODE_RANK", "MASTER_PORT")


def main() -> int:
    """The ranks' exit code; 2 after a line about variables that cannot be; 130 after Ctrl-C."""
    program.begin()
    try:
        for name in READ:
            if name in os.environ:
                ranks.number(name)
    except SettingError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    try:
        from composer.cli import launcher
    except KeyboardInterrupt:
        return INTERRUPTED

    interrupted = False

    def wait_longer(number: int, frame: Any) -> None:
        launcher.CLEANUP_TIMEOUT = PATIENCE
        signal.signal(number, signal.SIG_IGN)  # a second one would end the waiting
        sys.exit(128 + number)  # as Composer's own handler does, which it set when it was imported

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt  # which the launcher expects; Composer's own handler raises another

    signal.signal(signal.SIGTERM, wait_longer)
    signal.signal(signal.SIGINT, interrupt)
    try:
        code = launcher.main()
    except ValueError as error:  # of its arguments and variables, before anything is started
        print(
            f"launch: {str(error).rstrip('.')}; see -h, or unset {' '.join(READ)}", file=sys.stderr
        )
        return 2
    return INTERRUPTED if interrupted else code


if __name__ == "__main__":
    sys.exit(main())

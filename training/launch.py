"""Composer's launcher, patient: `python -m training.launch -n 8 training/train.py FILE.yaml …`.

Arguments, output and exit codes are those of `composer`. That one kills its ranks 30 s after it got
SIGTERM, which is less than a checkpoint of a large network may take to be written.
"""

from __future__ import annotations

import datetime
import signal
import sys
from typing import Any

PATIENCE = datetime.timedelta(minutes=15)
"""From SIGTERM on; whoever sent it has a limit of his own. Ranks that hang because another one
crashed get Composer's 30 s."""


def main() -> int:
    from composer.cli import launcher

    def wait_longer(number: int, frame: Any) -> None:
        launcher.CLEANUP_TIMEOUT = PATIENCE
        signal.signal(number, signal.SIG_IGN)  # a second one would end the waiting
        sys.exit(128 + number)  # as Composer's own handler does, which it set when it was imported

    signal.signal(signal.SIGTERM, wait_longer)
    return launcher.main()


if __name__ == "__main__":
    sys.exit(main())

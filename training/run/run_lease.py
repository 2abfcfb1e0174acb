"""One training at a time in a run's folder, and in its copies' place: see pipeline.core.lease.

All ranks of a run are one owner: the first holds the leases. No torch here.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence

from pipeline.core import lease
from pipeline.core.errors import StorageError
from pipeline.core.store import Store
from training.checkpoint.remote import open_copy
from training.config.settings import Config

REMEDY = "wait for it, stop it, or choose another folder (folder=runs/NAME)"
REMOTE_REMEDY = "wait for it, stop it, or choose another place for the copies (checkpoint.remote)"


@contextlib.contextmanager
def alone(config: Config, arguments: Sequence[str]) -> Iterator[Callable[[], str]]:
    """Holds the run's folder, and `checkpoint.remote`, while the block runs.

    Gives:
        What says who has taken one of them over, because this process stood still for too long; ""
        as long as nobody has.

    Raises:
        SettingError: another training holds one of them.
        StorageError: the folder cannot be written.
    """
    command = shlex.join(["training/train.py", *arguments])
    folder = config.run_folder()
    try:
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            held = [enter(lease.held(Store(folder), [""], command, remedy=REMEDY))]
            if config.checkpoint.remote:
                store = open_copy(config.checkpoint.remote)
                try:
                    held.append(enter(lease.held(store, [""], command, remedy=REMOTE_REMEDY)))
                except StorageError as error:  # which does not keep a training from training
                    print(f"checkpoint.remote: {error} (no lease there)", file=sys.stderr)
            yield lambda: next((holding.lost for holding in held if holding.lost), "")
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # which is empty where the run was refused

"""Train a MicroDiT from cached latents: `composer training/train.py FILE.yaml [key.sub=value …]`.

`python training/train.py …` does the same on one process. `dry_run=true` prints the resolved
settings and the costs. Everything that can be wrong with the settings or the shards is said before
torch is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

if sys.path and os.path.basename(sys.path[0]) == "training":
    # A script's own folder comes first on the path; there, files of this package would stand in for
    # modules of the same name. Its parent is what belongs there.
    sys.path[0] = os.path.dirname(sys.path[0])

from pipeline.core import program
from pipeline.core.errors import BrokenShard, SettingError, StorageError
from pipeline.core.temporary import shorten_sockets
from pipeline.core.version import version_line
from training import ranks
from training.checkpoint import run_folder
from training.config.load import load
from training.data import dev_shm
from training.observe import credentials
from training.run.preflight import check
from training.run.run_lease import alone
from training.threads import share_cores

INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended


def main(arguments: list[str]) -> int:
    """Exit code: 0; 2 after a line on standard error that says what to change; 1 where a disk,
    store or file fails; 130 after Ctrl-C; 143 after SIGTERM, with a checkpoint saved."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    if "--version" in arguments:
        print(version_line())
        return 0
    program.begin()
    share_cores()
    try:
        ranks.settle()
    except SettingError as error:  # which rank this is, nobody can tell
        print(f"train: {error}", file=sys.stderr)
        return 2
    running = False
    try:
        shorten_sockets()
        config = load(arguments)
        plan = check(config, need_data=not config.dry_run)
        if config.dry_run:
            from training.run.cost import report

            if ranks.first():
                print(report(plan))
            return 0
        run_folder.check(plan)
        if config.parallel != "ddp":
            from training.optim import parallel  # and torch with it

            parallel.check(config)
        left = run_folder.unfinished(plan)
        busy = bool(left or config.checkpoint.remote)
        own = busy and ranks.first()
        if own:
            credentials.check(config)
        with alone(config, arguments) if own else contextlib.nullcontext() as taken:
            if ranks.first():
                run_folder.link_last(plan)
            if busy:
                dev_shm.require(plan, left)
                _quiet_imports()
                from training.run.stage_callbacks import StayAlone
                from training.run.stopping import EXIT_CODE, Terminated
                from training.run.trainer import run

                running = True
                try:
                    run(plan, [StayAlone(taken)] if taken else [])
                except Terminated as place:
                    if ranks.first():
                        print(
                            f"train: SIGTERM: the same command goes on from {place}",
                            file=sys.stderr,
                        )
                    return EXIT_CODE
        if ranks.first():
            where = config.run_folder()
            what = f"stage {config.stage} of {where}" if config.stage else where
            print(f"{what} is finished; see python -m training.generate --checkpoint {where}")
        return 0
    except SettingError as error:
        # Settings are the same on all ranks; what goes wrong later may concern one of them alone.
        if ranks.first() or running:
            rank = "" if ranks.first() else f"rank {os.environ['RANK']}: "
            for line in _message(error).splitlines():
                print(f"train: {rank}{line}", file=sys.stderr)
        return 2
    except (BrokenShard, StorageError) as error:
        # Of any rank: each may have its own disk.
        for line in _message(error).splitlines():
            print(f"train: {line}", file=sys.stderr)
        return 1
    except OSError as error:  # of a file of the run: a folder in its place, no right to read it
        if error.filename is None:
            raise
        said = f"cannot use {error.filename2 or error.filename}: {error.strerror or error}"
        print(f"train: {said}; put that right, and the same command goes on", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as error:  # Composer makes the one of the other
        if isinstance(error, SystemExit) and error.code != INTERRUPTED:
            raise
        # A launcher that got Ctrl-C as well sends this, and would be answered with a traceback.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("train: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED


def _message(error: Exception) -> str:
    """The error's own lines; torch wraps an error of a loader process in its traceback."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.rstrip().splitlines()[-1].partition(f"{type(error).__name__}: ")[2]
    return text


def _quiet_imports() -> None:
    """Warnings of Composer's and its dependencies' own imports, about which nobody here can act."""
    import warnings

    for module in ("composer", "torch", "torchmetrics", "streaming", "mcli", "google"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == INTERRUPTED:
        signal.alarm(10)  # leaving the process group may wait for ranks that are gone
    sys.exit(code)

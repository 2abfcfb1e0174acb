"""What a killed run leaves in shared memory, and who removes it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import ROOT
from tests.training.helpers.groups import make_encoders, make_source, settings
from training.config.load import resolve
from training.data import shared_memory
from training.data.loader import make_dataset, make_loader
from training.data.shared_memory import SHM, named_after, remove_dead, run_number
from training.run.preflight import check

# argv: settings as JSON. Says when it reads, then waits in the middle of an epoch.
READER = """
import json, sys, time
from training.config.load import resolve
from training.data.loader import make_dataset, make_loader
from training.run.preflight import check

loader = make_loader(make_dataset(check(resolve(json.loads(sys.argv[1]))), "masked"), 2, True)
loader.load_state_dict({"epoch": 1, "sample_in_epoch": 8, "num_canonical_nodes": 1,
                        "shuffle_seed": 5, "initial_physical_nodes": 1})
iterator = iter(loader)
next(iterator)
print("reading", flush=True)
if len(sys.argv) > 2:
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("leftovers")
    encoders = make_encoders(folder / "encoders")
    make_source(folder / "data", encoders)
    return settings(folder / "data", encoders, folder / "unset")


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Processes that are killed after the test with all they started."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        kill(process)


def reader(
    raw: dict[str, Any], folder: Path, started: list[subprocess.Popen], *stay: str
) -> subprocess.Popen:
    """A process group that streams; with "stay" until it is killed."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        READER,
        json.dumps(raw | {"folder": str(folder)}),
    ]
    process = subprocess.Popen(
        [*command, *stay], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    return process


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def left(folder: Path) -> set[str]:
    """What stands under a run's names, here and in the temporary folder."""
    number = run_number(folder)
    return {
        p.name for place in (SHM, Path(tempfile.gettempdir())) for p in place.glob(f"{number}*")
    }


def test_a_killed_runs_leftovers_are_removed_by_its_next_start(
    raw: dict[str, Any], tmp_path: Path, started: list[subprocess.Popen]
) -> None:
    """And nothing else: not a living start's of the same run, not another run's, dead or alive."""
    run, other = tmp_path / "run", tmp_path / "other"
    alive = reader(raw, run, started, "stay")
    living = left(run)
    assert sum(name.endswith("_lock") for name in living) == 1
    killed = [reader(raw, folder, started, "stay") for folder in (run, other)]
    for process in killed:
        kill(process)
    dead, others = left(run) - living, left(other)
    assert {name[17:] for name in dead} >= {"_locals", "_barrier", "_resume", "_barrier_filelock"}
    assert len(others) == len(dead)
    begun = time.monotonic()
    assert reader(raw, run, started).wait(timeout=60) == 0
    assert time.monotonic() - begun < 60
    assert left(run) == living
    assert left(other) == others
    kill(alive)
    for folder in (run, other):
        remove_dead(run_number(folder))
        assert not left(folder)


def test_only_the_trainer_itself_is_killed(
    raw: dict[str, Any], tmp_path: Path, started: list[subprocess.Popen]
) -> None:
    """Its loader processes hold no lock; that they live on for seconds holds nobody up."""
    process = reader(raw, tmp_path, started, "stay")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    second = reader(raw, tmp_path, started, "stay")
    names = left(tmp_path)
    assert sum(name.endswith("_lock") for name in names) == 1
    time.sleep(7)  # the killed one's loader processes and its resource tracker end, and clean up
    assert left(tmp_path) == names
    kill(second)
    remove_dead(run_number(tmp_path))
    assert not left(tmp_path)


def test_datasets_of_one_process_have_names_of_their_own(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    plan = check(resolve(raw | {"folder": str(tmp_path)}))
    first, second = make_dataset(plan, "masked"), make_dataset(plan, "full")
    assert first._shm_prefix_int != second._shm_prefix_int
    for dataset in (first, second):
        assert len(list(make_loader(dataset, 0, trimmed=True))) == 5
    locks = [name for name in left(tmp_path) if name.endswith("_lock")]
    assert len(locks) == 1
    assert {name[:14] for name in left(tmp_path)} == {locks[0][:14]}


def test_names_are_a_runs_own() -> None:
    numbers = [run_number(Path(f"/runs/{i}"), node) for i in range(300) for node in range(3)]
    assert len({*numbers}) == 900
    assert all(len(str(number)) == 9 for number in numbers)


def test_a_lock_that_was_taken_away_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between creating the file and locking it another start may take it for a dead one's."""
    run, flock, calls = run_number(tmp_path), shared_memory.fcntl.flock, []

    def late(file: int, operation: int) -> None:
        if not calls:
            calls.append(operation)
            remove_dead_really(run)
        flock(file, operation)

    def remove_dead_really(run: int) -> None:
        for lock in SHM.glob(f"{run}?????_lock"):
            lock.unlink()

    monkeypatch.setattr(shared_memory.fcntl, "flock", late)
    start = shared_memory._Start(run, 7)
    start.hold()
    assert left(tmp_path) == {f"{run}00007_lock"}
    remove_dead(run)  # ours lives
    assert left(tmp_path) == {f"{run}00007_lock"}
    start.release()
    assert not left(tmp_path)


def test_the_librarys_names_come_back(tmp_path: Path) -> None:
    names = vars(shared_memory.library)
    before = names["get_shm_prefix"]
    with named_after(tmp_path):
        assert names["get_shm_prefix"] is not before
    assert names["get_shm_prefix"] is before

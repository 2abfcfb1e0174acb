"""One training at a time in a folder, and in its copies' place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import lease, process
from pipeline.core.errors import SettingError
from pipeline.core.store import Store
from tests.training.helpers.runs import ROOT, equal, make_toy, plan_of
from training.run import trainer
from training.run.stage_callbacks import StayAlone
from training.train import main

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    raw = make_toy(tmp_path_factory.mktemp("alone"))
    stages = {name: {"steps": 3, "save_every": 1} for name in ("first", "second")}
    return {**raw, "stages": stages, "evaluate": {"every": 0}}


@pytest.fixture
def file(data: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**data, "folder": str(tmp_path / "run")}))
    return path


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("argument", ["seed=3", "stage=first", "stages.second.save_every=2"])
def test_a_second_training_is_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, argument: str
) -> None:
    run, parent = tmp_path / "run", process.identity(os.getppid())
    record = {"owner": parent, "command": "training/train.py other.yaml", "counter": 1}
    Store(run).write_json(f"leases/{parent}.json", record)
    before = files(run)
    assert main([str(file), argument]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"train: {run} is being written by process {os.getppid()} on "
        f"{process.host().rpartition('.')[0]} (training/train.py other.yaml); wait for it, stop "
        "it, or choose another folder (folder=runs/NAME)\n"
    )
    assert files(run) == before


def test_copies_of_another_training_that_runs(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = tmp_path / "copy"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as holder:
        who = process.identity(holder.pid)
        Store(copy).write_json(f"leases/{who}.json", {"owner": who, "command": "", "counter": 1})
        assert main([str(file), f"checkpoint.remote={copy}"]) == 2
        holder.communicate()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train: {copy} is being written by process {holder.pid} on ")
    assert "choose another place for the copies (checkpoint.remote)" in line
    assert not (tmp_path / "run").exists()


def test_nothing_stays_of_it(file: Path, tmp_path: Path) -> None:
    assert main([str(file), f"checkpoint.remote={tmp_path / 'copy'}"]) == 0
    for folder in ("run", "copy"):
        assert not (tmp_path / folder / "leases").exists()


def test_a_finished_run_needs_none(file: Path) -> None:
    assert main([str(file)]) == 0
    with lease.held(Store(file.parent / "run"), [""], "another"):
        assert main([str(file)]) == 0


def test_a_run_that_was_taken_for_dead_ends(data: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(data, tmp_path / "run")
    with pytest.raises(
        SettingError, match=r"^another, which took this run for dead; this one ends"
    ):
        trainer.run(plan, [StayAlone(lambda: "another")])
    assert not list((tmp_path / "run").rglob("*.pt"))


@pytest.mark.slow
def test_two_at_once_and_a_kill(file: Path, tmp_path: Path) -> None:
    """One trains, the other is refused in a line; after a kill the next goes on at once."""
    run, command = tmp_path / "run", [sys.executable, "training/train.py", str(file)]
    steps = ["stages.first.steps=150", "stages.second.steps=1", "stages.first.save_every=50"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([*command, *steps], cwd=ROOT, stderr=subprocess.PIPE, text=True)

    both = [start(), start()]
    while all(one.poll() is None for one in both):
        time.sleep(0.1)
    refused, trains = sorted(both, key=lambda one: one.poll() is None)
    assert refused.returncode == 2
    (line,) = refused.communicate()[0:2][1].splitlines()
    assert f"{run} is being written by process {trains.pid} on " in line
    # Whole: one that is being written has a longer name.
    while not list(run.rglob("step-????????.pt")):
        assert trains.poll() is None
        time.sleep(0.1)
    trains.send_signal(signal.SIGKILL)
    trains.communicate()
    began = time.monotonic()
    with lease.held(Store(run), [""], ""):
        assert time.monotonic() - began < 1
    third = start()
    error = third.communicate(timeout=240)[1]
    assert third.returncode == 0, error
    assert "goes on after" in error
    trainer.run(
        plan_of(
            json.loads(file.read_text()),
            tmp_path / "other",
            stages={
                "first": {"steps": 150, "save_every": 50},
                "second": {"steps": 1, "save_every": 1},
            },
        )
    )
    assert equal(run / "model.safetensors", tmp_path / "other/model.safetensors")

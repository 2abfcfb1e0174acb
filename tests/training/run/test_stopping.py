"""SIGTERM to a running training: it saves where it is, says so with its exit code, and goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.checkout import ROOT
from tests.training.helpers.groups import make_encoders, make_source, settings
from training.checkpoint.run_folder import StageFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run whose only checkpoint is that of its last step."""
    folder = tmp_path_factory.mktemp("shards")
    encoders = make_encoders(folder / "encoders")
    make_source(folder / "data", encoders)
    stage = {"steps": STEPS, "mask": "deferred", "mask_ratio": 0.5, "save_every": 10_000}
    raw = settings(folder / "data", encoders, folder / "unset")
    return raw | {"stages": {"masked": stage}, "logging": {"every": 0.01}}


def command(path: Path, ranks: int) -> list[str]:
    launcher = [str(Path(sys.executable).parent / "composer"), "-n", str(ranks)]
    return [*(launcher if ranks else [sys.executable]), "training/train.py", str(path)]


def run(path: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(path, ranks), cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def term_after(said: str, path: Path, ranks: int, everyone: bool) -> tuple[int, str]:
    """Starts a run and sends SIGTERM when it has said that; exit code and what it said."""
    log = path.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(command(path, ranks), cwd=ROOT, stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 200
            while not re.search(said, log.read_text()):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
            children = psutil.Process(process.pid).children(recursive=True)
            for pid in [process.pid, *(c.pid for c in children if everyone)]:
                os.kill(pid, signal.SIGTERM)
            return process.wait(120), log.read_text()
        finally:
            for child in psutil.Process(os.getpid()).children():
                if child.pid == process.pid:
                    child.kill()
            process.wait()


@pytest.fixture(scope="module")
def whole(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of an uninterrupted run."""
    path = tmp_path_factory.mktemp("whole") / "run.yaml"
    path.write_text(json.dumps({**data, "folder": str(path.parent / "run")}))
    result = run(path, 0)
    assert result.returncode == 0, result.stderr
    return path.parent / "run/masked/live.safetensors"


@pytest.mark.parametrize(
    ("ranks", "workers", "everyone"),
    [
        (0, 0, False),
        (0, 2, True),  # as Slurm does it: loader processes get the signal as well
        (2, 0, False),  # the launcher hands it on
    ],
)
def test_sigterm_saves_and_the_run_goes_on(
    data: dict[str, Any], whole: Path, tmp_path: Path, ranks: int, workers: int, everyone: bool
) -> None:
    path = tmp_path / "run.yaml"
    changes = {"folder": str(tmp_path / "run"), "data": data["data"] | {"workers": workers}}
    path.write_text(json.dumps(data | changes))
    code, said = term_after(r"masked \d+/", path, ranks, everyone)
    assert code == 143, said
    (saved,) = StageFolder(tmp_path / "run/masked").checkpoints()
    step = int(saved.stem.removeprefix("step-"))
    assert 0 < step < STEPS
    if not ranks:
        assert f"train: SIGTERM: the same command goes on from {saved}" in said
    assert f"masked {step}/{STEPS}  SIGTERM: saving a checkpoint\n" in said
    StageFolder(saved.parent).part(STEPS).write_bytes(b"half")  # as a kill leaves it
    result = run(path, ranks)
    lost = f"masked {step}/{STEPS}  an earlier start was killed while it wrote step-{STEPS:08}.pt"
    assert lost in result.stderr
    assert result.returncode == 0, result.stdout + result.stderr
    if not ranks:  # sums of two ranks' gradients round differently
        found, expected = load_file(tmp_path / "run/masked/live.safetensors"), load_file(whole)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("ranks", [0, 2])
def test_sigterm_before_the_first_step_is_a_line(
    data: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**data, "folder": str(tmp_path / "run")}))
    code, said = term_after(f"stage masked: {STEPS} steps", path, ranks, everyone=False)
    assert code == 143, said
    assert "training/run/trainer.py" not in said  # `composer` shows a traceback of its own
    if not ranks:
        assert "train: SIGTERM: the same command goes on from" in said


# argv: settings as JSON, a folder for what ranks have to say. The first rank's copying takes 5 s.
SLOW_COPY = """
import json, os, pathlib, signal, sys, time
from composer import Callback
from composer.utils import dist
from training.checkpoint import remote
from training.run import trainer
from training.config.load import resolve
from training.run.preflight import check
from training.run.stopping import Terminated

rank = os.environ["RANK"]

class Copying(remote.RemoteCopy):
    def __exit__(self, *error):
        super().__exit__(*error)
        if rank == "0":
            time.sleep(5)
            os.kill(os.getpid(), signal.SIGTERM)  # again
            time.sleep(0.1)
            pathlib.Path(sys.argv[2], "copied").touch()

class Term(Callback):
    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 2 and rank == "1":
            os.kill(os.getpid(), signal.SIGTERM)

trainer.RemoteCopy = Copying
try:
    trainer.run(check(resolve(json.loads(sys.argv[1]))), [Term()])
except Terminated:
    copied = pathlib.Path(sys.argv[2], "copied").exists()
    pathlib.Path(sys.argv[2], f"end-{rank}").write_text(str(copied))
    sys.exit(143)
"""


def test_no_rank_ends_before_the_first_has_copied(data: dict[str, Any], tmp_path: Path) -> None:
    """Or the launcher, or Slurm, would kill it."""
    script = tmp_path / "script.py"
    script.write_text(SLOW_COPY)
    raw = json.dumps(data | {"folder": str(tmp_path / "run")})
    launcher = str(Path(sys.executable).parent / "composer")
    command = [launcher, "-n", "2", str(script), raw, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 143, result.stdout + result.stderr
    assert [(tmp_path / f"end-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]


# argv: whose main. Its limit is 1 s here, in the place of 30.
LAUNCHER = """
import datetime, importlib, sys
from composer.cli import launcher
launcher.CLEANUP_TIMEOUT = datetime.timedelta(seconds=1)
sys.exit(importlib.import_module(sys.argv.pop(1)).main())
"""
# A rank that needs 4 s to end in order.
RANK = """
import pathlib, signal, sys, time

def save(number, frame):
    time.sleep(4)
    pathlib.Path(sys.argv[2]).touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1]).touch()
time.sleep(120)
"""


@pytest.mark.parametrize(
    ("main", "codes"),
    # Composer says 1 where the rank that it killed is not gone when it looks.
    [("composer.cli.launcher", (256 - 9, 1)), ("training.launch", (143,))],
    ids=["composer", "patient"],
)
def test_the_patient_launcher(tmp_path: Path, main: str, codes: tuple[int, ...]) -> None:
    script, up, saved = (tmp_path / name for name in ("rank.py", "up", "saved"))
    script.write_text(RANK)
    command = [sys.executable, "-W", "ignore", "-c", LAUNCHER, main, "-n", "1"]
    process = subprocess.Popen([*command, str(script), str(up), str(saved)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not up.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    if main == "training.launch":
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)  # of somebody who has no patience
    assert process.wait(60) % 256 in codes
    assert saved.exists() == (main == "training.launch")


@pytest.mark.parametrize("launcher", [[], ["-m", "training.launch", "-n", "1"]])
def test_ctrl_c_is_no_traceback(data: dict[str, Any], tmp_path: Path, launcher: list[str]) -> None:
    path, log = tmp_path / "run.yaml", tmp_path / "log"
    path.write_text(json.dumps(data | {"folder": str(tmp_path / "run")}))
    command = [sys.executable, *launcher, "training/train.py", str(path)]
    with open(log, "w") as file:  # a terminal sends it to all processes at once
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
    deadline = time.monotonic() + 200
    while not re.search(r"masked \d+/", log.read_text()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()
    assert "train: interrupted; the same command goes on" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_run_outlives_the_reader_of_its_log(data: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    stages = {"masked": data["stages"]["masked"] | {"steps": 5}}
    path.write_text(json.dumps(data | {"folder": str(tmp_path / "run"), "stages": stages}))
    command = [sys.executable, "-m", "training.launch", "-n", "1", "training/train.py", str(path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(200) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()

"""The trainer end to end on small shards: stages, resume to the bit, what it writes and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.errors import SettingError
from tests.training.groups import make_encoders, make_source, settings
from training.config import resolve
from training.folder import check as check_folder
from training.folder import unfinished
from training.preflight import Plan, check

KILLED_RUN = """
import json, os, signal, sys
from composer import Callback
from training.assemble import run
from training.config import resolve
from training.preflight import check

class Record(Callback):
    def batch_end(self, state, logger):
        self.last = state.total_loss_dict["loss/train/total"]
        with open(sys.argv[2], "a") as file:
            name = f"{state.run_name} {state.timestamp.batch.value} {self.last!r}"
            print(name, file=file, flush=True)
        if name.rsplit(" ", 1)[0] == sys.argv[3]:
            os.kill(os.getpid(), signal.SIGKILL)

run(check(resolve(json.loads(sys.argv[1]))), [Record()])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings over shards of the toy source; tests set their own folder."""
    folder = tmp_path_factory.mktemp("trainer")
    encoders = make_encoders(folder / "encoders")
    make_source(folder / "data", encoders)
    make_source(folder / "data", encoders, resolution=128)
    return settings(folder / "data", encoders, folder / "unset")


def plan_of(data: dict[str, Any], folder: Path, **changes: Any) -> Plan:
    return check(resolve({**data, "folder": str(folder), **changes}))


def run_process(raw: dict[str, Any], losses: Path, kill_at: str = "never") -> int:
    """Trains in a process of its own, which kills itself after the step it is told."""
    command = [sys.executable, "-W", "ignore", "-c", KILLED_RUN, json.dumps(raw), str(losses)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, kill_at], env=env, timeout=300).returncode


def last_losses(path: Path) -> dict[str, str]:
    """Step -> loss as written last; a resumed run repeats the steps since its checkpoint."""
    return dict(line.rsplit(" ", 1) for line in path.read_text().splitlines())


@pytest.fixture(scope="module")
def whole(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run; losses.txt holds its losses."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_process({**data, "folder": str(folder / "run")}, folder / "losses.txt") == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "kills"),
    [
        (0, ["toy-masked 6", "toy-full 2"]),
        (0, ["toy-masked 5"]),  # 40 samples, batches of 8: the last step of an epoch
        (0, ["toy-masked 9", "toy-masked 10", "toy-full 6"]),
        (2, ["toy-masked 7", "toy-full 5"]),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    data: dict[str, Any], whole: Path, tmp_path: Path, workers: int, kills: list[str]
) -> None:
    raw = {**data, "folder": str(tmp_path / "run"), "data": {**data["data"], "workers": workers}}
    for kill in kills:
        assert run_process(raw, tmp_path / "losses.txt", kill) == -signal.SIGKILL
    assert run_process(raw, tmp_path / "losses.txt") == 0
    assert last_losses(tmp_path / "losses.txt") == last_losses(whole / "losses.txt")
    for name in ("model.safetensors", "full/live.safetensors", "masked/model.safetensors"):
        expected, found = load_file(whole / "run" / name), load_file(tmp_path / "run" / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name

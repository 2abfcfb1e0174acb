"""What launchers say in the environment, and what other things have left there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import SettingError
from tests.checkout import ROOT
from tests.training.helpers.groups import Encoders, make_source
from training import ranks

ALL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")


def launched(rank: int, world: int, per_node: int) -> dict[str, str]:
    """As torchrun has it."""
    numbers = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank % per_node,
        "LOCAL_WORLD_SIZE": per_node,
    }
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return {**{name: str(value) for name, value in numbers.items()}, **place}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of this process, with nothing of a launcher in it; put back afterwards."""
    here = {k: v for k, v in os.environ.items() if k not in (*ALL, "MASTER_ADDR", "MASTER_PORT")}
    monkeypatch.setattr(os, "environ", here)
    return here


@pytest.mark.parametrize(
    "stray",
    [
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "abc"},
        {"RANK": "1"},
        {"LOCAL_WORLD_SIZE": "0"},
        {"NODE_RANK": "3", "LOCAL_RANK": "2"},
    ],
)
def test_what_no_launcher_left_is_ignored_with_a_line(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str], stray: dict[str, str]
) -> None:
    environment |= stray
    ranks.settle()
    assert not environment.keys() & set(ALL)
    (line,) = capsys.readouterr().err.splitlines()
    assert all(f"{name}={value}" in line for name, value in stray.items())
    assert "one process trains" in line


def test_nothing_is_said_where_nothing_is_stray(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks.settle()
    environment |= {"RANK": "0", "WORLD_SIZE": "1"}
    ranks.settle()
    assert environment["LOCAL_WORLD_SIZE"] == "1"
    environment |= launched(rank=5, world=8, per_node=4) | {"NODE_RANK": "7"}
    ranks.settle()
    assert environment["NODE_RANK"] == "1"  # whatever was there
    assert not ranks.first()
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "x"}, "RANK=x: not a whole number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: not a whole number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is not"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not"),
        ({"RANK": "9"}, "do not fit each other"),
        ({"LOCAL_WORLD_SIZE": "0"}, "do not fit each other"),
        ({"LOCAL_WORLD_SIZE": "3"}, "do not fit each other"),
        ({"LOCAL_RANK": "2"}, "do not fit each other"),
    ],
)
def test_a_launcher_that_contradicts_itself(
    environment: dict[str, str], changes: dict[str, str], message: str
) -> None:
    environment |= launched(rank=5, world=8, per_node=4) | changes
    with pytest.raises(SettingError, match=message):
        ranks.settle()


@pytest.mark.parametrize(
    ("command", "env", "code", "message"),
    [
        (["training/train.py"], {"RANK": "2", "WORLD_SIZE": "2"}, 2, "LOCAL_RANK is not"),
        (["training/train.py"], {"WORLD_SIZE": "abc"}, 0, "WORLD_SIZE=abc in the environment"),
        (
            ["-m", "training.launch", "training/train.py"],
            {"WORLD_SIZE": "abc"},
            2,
            "launch: WORLD_SIZE=abc: not a whole number",
        ),
        pytest.param(
            ["-m", "training.launch", "-n", "1", "training/train.py"],
            {"NODE_RANK": "3"},
            2,
            "launch: node_rank(3) != 0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_line_from_the_program(
    tmp_path: Path,
    raw: dict[str, Any],
    encoders: Encoders,
    command: list[str],
    env: dict[str, str],
    code: int,
    message: str,
) -> None:
    make_source(Path(raw["data"]["root"]), encoders)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    clean = {k: v for k, v in os.environ.items() if k not in ALL}
    found = subprocess.run(
        [sys.executable, *command, str(path), "dry_run=true"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean | env,
    )
    assert found.returncode == code
    (line,) = found.stderr.splitlines()
    assert message in line

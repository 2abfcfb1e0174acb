"""/dev/shm that is missing or small, and loader processes that the system ends."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import limits
from pipeline.core.errors import SettingError
from tests.checkout import ROOT
from tests.training.helpers.groups import Encoders, changed, make_source
from training.config.load import resolve
from training.data import dev_shm, loader_deaths
from training.data.loader import make_dataset, make_loader
from training.run.preflight import check


@pytest.fixture
def raw_with_data(raw: dict[str, Any], encoders: Encoders) -> dict[str, Any]:
    make_source(Path(raw["data"]["root"]), encoders)
    return changed(raw, "data.workers", 2)


def test_what_the_loaders_need_is_what_they_take(raw_with_data: dict[str, Any]) -> None:
    plan = check(resolve(raw_with_data))
    loader: Any = make_loader(make_dataset(plan, "masked"), 2, trimmed=True)
    took = sum(pool._memory.nbytes for pool in loader.collate_fn.keywords["pools"])
    order = 8 * 40  # of the samples of an epoch
    assert dev_shm.needed(plan, "masked") == took + order + dev_shm._OWN


def test_too_little_is_a_line_with_the_remedy(
    raw_with_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = check(resolve(raw_with_data))
    need = dev_shm.needed(plan, "full")

    class Facts:
        f_bavail, f_frsize = need - 1, 1

    monkeypatch.setattr(os, "statvfs", lambda path: Facts)
    with pytest.raises(SettingError, match=r"/dev/shm: .* --shm-size=1g.* data.workers \(0 reads"):
        dev_shm.require(plan, ["masked", "full"])
    Facts.f_bavail = need
    dev_shm.require(plan, ["masked", "full"])


def test_more_loaders_and_ranks_need_more(
    raw_with_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = check(resolve(raw_with_data))
    none = dataclasses.replace(plan, config=resolve(changed(raw_with_data, "data.workers", 0)))
    own, base = dev_shm.needed(plan, "full"), dev_shm.needed(none, "full")
    assert own > base
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two nodes: half of the batch is here
    assert dev_shm.needed(plan, "full") - base == (own - base) // 2


def test_none_at_all_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SHM", tmp_path / "shm")
    with pytest.raises(SettingError, match="is missing, which processes share memory through"):
        limits.require_shared_memory()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "want of memory"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "want of memory"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is …", "/dev/shm is full"),
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ", "Segmentation"),
        ("CUDA error: out of memory", ""),
    ],
)
def test_what_a_loaders_death_means(error: str, line: str) -> None:
    found = loader_deaths.explained(RuntimeError(error))
    assert line in found
    assert bool(found) == bool(line)


# argv: settings as JSON. Kills a loader process after the second step, as the system does.
KILLS_A_LOADER = """
import os, signal, sys
import psutil
from composer import Callback
from training import train
from training.run import trainer

class Kill(Callback):
    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 2:
            for child in psutil.Process().children():
                if child.cmdline() == psutil.Process().cmdline():
                    os.kill(child.pid, signal.SIGKILL)

run = trainer.run
trainer.run = lambda plan, others: run(plan, [*others, Kill()])
sys.exit(train.main([sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_loader_that_is_killed_ends_the_run_with_a_line(
    tmp_path: Path, raw_with_data: dict[str, Any]
) -> None:
    stages = {"masked": {"steps": 2000, "save_every": 1000}}
    raw = changed(raw_with_data, "stages", stages)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLS_A_LOADER, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
    )
    assert found.returncode == 1, found.stderr
    assert "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1].startswith(
        "train: stage masked: a loader process was killed by the system"
    )

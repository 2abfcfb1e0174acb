"""No disk left while a run saves: one line, the last good checkpoint stays, and the run goes on."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback
from safetensors.torch import load_file

from pipeline.core.errors import SettingError, StorageError
from tests.pipeline.engine.test_disk_faults import Disk
from tests.training.helpers.groups import make_encoders, make_source, settings
from training.checkpoint.checkpoints import read
from training.checkpoint.run_folder import StageFolder
from training.config.load import resolve
from training.config.plan import TrainingPlan
from training.run import trainer
from training.run.preflight import check

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own

STAGES = {"full": {"steps": 6, "save_every": 4}}
SPARE = 50_000  # bytes, a part of a checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shards")
    encoders = make_encoders(folder / "encoders")
    make_source(folder / "data", encoders)
    return settings(folder / "data", encoders, folder / "unset") | {"stages": STAGES}


def plan_of(data: dict[str, Any], path: Path) -> TrainingPlan:
    return check(resolve({**data, "folder": str(path)}))


@pytest.fixture(scope="module")
def whole(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a run with room enough."""
    path = tmp_path_factory.mktemp("whole") / "run"
    trainer.run(plan_of(data, path))
    return path / "model.safetensors"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk", "64m")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.path)], check=True)


class FillsUp(Callback):
    """Leaves the disk too little room after a step, and after its checkpoint."""

    def __init__(self, disk: Disk, step: int) -> None:
        self.disk = disk
        self.step = step

    def batch_checkpoint(self, state, logger) -> None:
        if state.timestamp.batch.value == self.step:
            used = int(subprocess.check_output(["du", "-sk", str(self.disk.path)]).split()[0])
            self.disk.remount(f"size={used + SPARE // 1000}k")


def names(path: Path) -> list[str]:
    """Without the figures."""
    return sorted({p.name for p in path.iterdir()} - {"metrics.jsonl", "loss.png"})


def same(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_last_good_checkpoint_stays(data: dict[str, Any], whole: Path, disk: Disk) -> None:
    path = disk.path / "run"
    with pytest.raises(SettingError, match=r"cannot write .*00006.pt.*good .* is .*00004.pt$") as e:
        trainer.run(plan_of(data, path), [FillsUp(disk, 4)])
    assert len(str(e.value).splitlines()) == 1
    stage = StageFolder(path / "full")
    assert names(stage.path) == ["settings.json", "step-00000004.pt"]
    assert read(stage.checkpoint(4)).model
    disk.remount("size=64m")
    trainer.run(plan_of(data, path))
    assert same(path / "model.safetensors", whole)


def test_no_room_for_finished_weights(data: dict[str, Any], whole: Path, disk: Disk) -> None:
    path = disk.path / "run"
    with pytest.raises(StorageError, match=r"stage full, in .*[Ss]pace.*goes on from it"):
        trainer.run(plan_of(data, path), [FillsUp(disk, 6)])
    assert names(path / "full") == ["settings.json", "step-00000006.pt"]
    disk.remount("size=64m")
    trainer.run(plan_of(data, path))
    assert same(path / "model.safetensors", whole)


class LimitsFiles(Callback):
    """As a quota does: from a step on, no file of this process may grow beyond a size."""

    def batch_start(self, state, logger) -> None:
        if state.timestamp.batch.value == 4:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (SPARE, hard))


def test_a_limit_on_file_sizes(data: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    path, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(SettingError, match=r"cannot write .*00006.pt.* is .*00004.pt$"):
            trainer.run(plan_of(data, path), [LimitsFiles()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(path / "full") == ["settings.json", "step-00000004.pt"]
    trainer.run(plan_of(data, path))
    assert same(path / "model.safetensors", whole)

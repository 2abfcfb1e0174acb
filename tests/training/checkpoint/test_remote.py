"""Copies of a run's checkpoints elsewhere: whole, in order, and enough to go on from."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback
from safetensors.torch import load_file

from pipeline.core.errors import SettingError, StorageError
from pipeline.core.store import Store
from tests.pipeline.helpers.s3 import BUCKET, S3Server, variables
from tests.training.helpers.groups import make_encoders, make_source, settings
from training.checkpoint.remote import RemoteCopy
from training.config.load import resolve
from training.config.plan import TrainingPlan
from training.run import trainer
from training.run.preflight import check
from training.run.stopping import Terminated
from training.train import main
from training.weights import weights_file

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own

STAGES = {
    "masked": {"steps": 6, "mask": "deferred", "mask_ratio": 0.5},
    "full": {"steps": 7, "keep_moments": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shards")
    encoders = make_encoders(folder / "encoders")
    make_source(folder / "data", encoders)
    return settings(folder / "data", encoders, folder / "unset") | {"stages": STAGES}


def plan_of(data: dict[str, Any], path: Path, remote: object, **changes: Any) -> TrainingPlan:
    checkpoint = {"remote": str(remote)}
    return check(resolve({**data, "folder": str(path), "checkpoint": checkpoint, **changes}))


@pytest.fixture(scope="module")
def whole(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of an uninterrupted run, and its copy."""
    folder = tmp_path_factory.mktemp("whole")
    trainer.run(plan_of(data, folder / "run", folder / "copy"))
    return folder / "run", folder / "copy"


class TermAt(Callback):
    """Sends this process SIGTERM in a step of the stage, and counts the steps that were made."""

    def __init__(self, stage: str = "", step: int = 0) -> None:
        self.place = (f"toy-{stage}", step)
        self.steps: list[tuple[str, int]] = []

    def after_forward(self, state, logger) -> None:
        if (state.run_name, state.timestamp.batch.value + 1) == self.place:
            os.kill(os.getpid(), signal.SIGTERM)

    def batch_end(self, state, logger) -> None:
        self.steps.append((state.run_name, state.timestamp.batch.value))


def equal(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def tree(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_what_is_copied(whole: tuple[Path, Path]) -> None:
    run, copy = whole
    names = ("live.safetensors", "metrics.jsonl", "model.safetensors", "settings.json")
    last = {"masked": "step-00000006.pt", "full": "step-00000007.pt"}
    assert tree(copy) == sorted(
        f"{stage}/{name}" for stage in STAGES for name in (*names, last[stage])
    )
    assert all((run / name).read_bytes() == (copy / name).read_bytes() for name in tree(copy))


@pytest.mark.parametrize("place", [("masked", 5), ("masked", 6), ("full", 3)])
def test_an_empty_folder_goes_on_from_the_copy(
    data: dict[str, Any], whole: tuple[Path, Path], tmp_path: Path, place: tuple[str, int]
) -> None:
    first, second = TermAt(*place), TermAt()
    with pytest.raises(Terminated, match=rf"{place[0]}/step-0*{place[1]}.pt$"):
        trainer.run(plan_of(data, tmp_path / "a", tmp_path / "copy"), [first])
    assert first.steps[-1] == (f"toy-{place[0]}", place[1])
    shutil.rmtree(tmp_path / "a")
    trainer.run(plan_of(data, tmp_path / "b", tmp_path / "copy"), [second])
    every = [(f"toy-{name}", i + 1) for name, s in STAGES.items() for i in range(s["steps"])]
    assert first.steps + second.steps == every
    assert equal(tmp_path / "b/model.safetensors", whole[0] / "model.safetensors")
    assert tree(tmp_path / "copy") == tree(whole[1])
    assert equal(tmp_path / "copy/full/live.safetensors", whole[0] / "full/live.safetensors")


def test_a_finished_run_is_fetched(
    data: dict[str, Any], whole: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    raw = {**data, "folder": str(tmp_path / "run"), "checkpoint": {"remote": str(whole[1])}}
    path.write_text(json.dumps(raw))
    assert main([str(path)]) == 0
    assert equal(tmp_path / "run/model.safetensors", whole[0] / "model.safetensors")
    # Checkpoints that nothing will go on from stay where they are.
    assert not (tmp_path / "run/masked/step-00000006.pt").exists()


def test_only_a_copy_that_is_further_is_fetched(
    data: dict[str, Any], whole: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(whole[1], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/full")
    shutil.copytree(whole[0], tmp_path / "run")
    again = TermAt()
    trainer.run(plan_of(data, tmp_path / "run", tmp_path / "copy"), [again])
    assert again.steps == []
    assert tree(tmp_path / "copy") == tree(whole[1])  # and the copy caught up


def test_a_copy_that_began_from_other_weights(
    data: dict[str, Any], whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """The first stage is here already, of the same settings, trained with other results."""
    shutil.copytree(whole[1], tmp_path / "copy")
    (tmp_path / "copy/full/model.safetensors").unlink()
    shutil.copytree(whole[0] / "masked", tmp_path / "run/masked")
    model = tmp_path / "run/masked/model.safetensors"
    changed = {name: value + 1 for name, value in load_file(model).items()}
    weights_file.write(model, changed, weights_file.read_metadata(model))
    with pytest.raises(SettingError, match=r"masked/model.safetensors holds other weights than"):
        trainer.run(plan_of(data, tmp_path / "run", tmp_path / "copy"))


def test_a_copy_of_another_run(
    data: dict[str, Any], whole: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = plan_of(data, tmp_path / "run", whole[1], seed=4)
    with pytest.raises(
        SettingError, match=r"checkpoint.remote=.* is of other settings \(seed: 3 -> 4\)"
    ):
        trainer.run(plan)
    assert not list((tmp_path / "run").rglob("*.pt"))


def test_a_store_that_fails_does_not_stop_the_training(
    data: dict[str, Any],
    whole: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    blocked = tmp_path / "blocked"
    blocked.touch()  # a file where a folder should be
    path = tmp_path / "run.yaml"
    raw = {**data, "folder": str(tmp_path / "run"), "checkpoint": {"remote": str(blocked / "copy")}}
    path.write_text(json.dumps(raw))
    assert main([str(path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("checkpoint.remote: cannot write") for line in lines)
    assert lines[-1].startswith("train: 10 files of ")
    assert "3 attempts failed" in lines[-1]
    assert equal(tmp_path / "run/model.safetensors", whole[0] / "model.safetensors")
    blocked.unlink()
    assert main([str(path)]) == 0  # copies what is missing, trains nothing
    assert tree(blocked / "copy") == tree(whole[1])


def test_a_url_that_nobody_can_read(data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^checkpoint.remote=nosuch://x: "):
        trainer.run(plan_of(data, tmp_path / "run", "nosuch://x"))


def test_a_checkpoint_that_was_replaced_is_left_out(tmp_path: Path) -> None:
    """While the first is under way two more are saved, and the middle one is deleted."""
    stage = tmp_path / "run/full"
    stage.mkdir(parents=True)
    paths = [stage / f"step-{step:08d}.pt" for step in (1, 2, 3)]
    os.mkfifo(paths[0])  # reading it waits for a writer
    paths[2].write_bytes(b"three")

    with RemoteCopy(tmp_path / "run", str(tmp_path / "copy"), keep=1) as mirror:
        mirror.put(paths[0])
        with open(paths[0], "wb") as pipe:  # waits for the reader
            mirror.put(paths[1])
            mirror.put(paths[2])
            pipe.write(b"one")
    assert mirror.failures == 0
    assert tree(tmp_path / "copy") == ["full/step-00000003.pt"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    pytest.importorskip("s3fs")
    folder = tmp_path_factory.mktemp("seaweedfs")
    with S3Server(folder) as server:
        yield server
    shutil.rmtree(folder)


@pytest.mark.slow
def test_on_an_object_store(
    data: dict[str, Any],
    whole: tuple[Path, Path],
    tmp_path: Path,
    server: S3Server,
    capsys: pytest.CaptureFixture,
) -> None:
    remote = f"s3://{BUCKET}/runs/toy"
    with variables(server.environment(AWS_MAX_ATTEMPTS="2")):
        with pytest.raises(Terminated):
            trainer.run(plan_of(data, tmp_path / "a", remote), [TermAt("full", 5)])
        second = TermAt()
        trainer.run(plan_of(data, tmp_path / "b", remote), [second])
        assert second.steps == [("toy-full", 6), ("toy-full", 7)]
        assert equal(tmp_path / "b/model.safetensors", whole[0] / "model.safetensors")
        store = Store(remote)
        assert sorted(entry.path for entry in store.walk("")) == tree(whole[1])
        store.download("full/model.safetensors", tmp_path / "model.safetensors")
        assert equal(tmp_path / "model.safetensors", whole[0] / "model.safetensors")
        server.stop()
        with pytest.raises(StorageError, match="cannot read s3://"):
            trainer.run(plan_of(data, tmp_path / "c", remote))

"""Files of a run that are empty, cut off or garbled: one line each, and nothing good is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import SettingError
from tests.training.helpers.runs import equal, make_toy, plan_of
from training.checkpoint.checkpoints import read
from training.observe import metrics_log
from training.observe.metrics_log import Journal
from training.run import trainer
from training.train import main

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    raw = make_toy(tmp_path_factory.mktemp("damage"))
    masked = raw["stages"]["masked"] | {"steps": 4, "save_every": 2, "warmup": 0}
    stages = {"masked": masked, "full": {"steps": 4, "save_every": 2}}
    return {**raw, "stages": stages, "evaluate": {"every": 0}, "checkpoint": {"keep": 2}}


@pytest.fixture(scope="module")
def whole(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer.run(plan_of(data, run))
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


Start = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def start(data: dict[str, Any], run: Path, capsys: pytest.CaptureFixture) -> Start:
    """Exit code and the lines on standard error of the run's command with these arguments."""
    path = run.parent / "run.yaml"
    path.write_text(json.dumps({**data, "folder": str(run)}))

    def start(*arguments: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = main([str(path), *arguments])
        return code, capsys.readouterr().err.splitlines()

    return start


def cut(path: Path) -> None:
    """Other bytes in a file of its own, as a copy that broke off leaves them."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


def garble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(value ^ 255 for value in data[middle : middle + 64])
    path.unlink()
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.unlink()
    path.touch()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b"{}"]
)
@pytest.mark.parametrize("name", ["full/settings.json", "masked/settings.json"])
def test_settings_json(run: Path, start: Start, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    code, lines = start()
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"train: {run / name}: ")
    assert "put it back, or remove it" in lines[0]
    (run / name).unlink()
    assert start()[0] == 0


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("full/settings.json", os.mkdir),
        ("full/metrics.jsonl", os.mkdir),
        ("full/step-00000004.pt", os.mkdir),
        ("full/step-00000004.pt", lambda path: os.symlink(path.name, path)),
        ("model.safetensors", os.mkdir),
    ],
)
def test_what_is_no_file(
    run: Path, start: Start, name: str, broken: Callable[[Path], object]
) -> None:
    """A folder, or a link to itself, in its place: named, and never set aside as damaged."""
    if name.startswith("full/"):
        (run / "full/model.safetensors").unlink()  # so that it goes on
    (run / name).unlink()
    broken(run / name)
    code, lines = start("checkpoint.skip_damaged=true")
    assert code == 1
    assert [line for line in lines if line.startswith(("Trace", "train: "))] == lines[-1:]
    assert lines[-1].startswith(f"train: cannot use {run}/")
    assert name in lines[-1]
    assert os.path.lexists(run / name)


@pytest.mark.parametrize("content", [b"", b"[{", b"{}", b"[3]", b'[{"to": "4"}]'])
def test_rollbacks_json(run: Path, start: Start, content: bytes) -> None:
    (run / "full/model.safetensors").unlink()  # so that it goes on
    (run / "full/rollbacks.json").write_bytes(content)
    code, lines = start()
    assert code == 2
    assert lines[-1].startswith(f"train: {run}/full/rollbacks.json: ")
    assert "remove it: the stage's checkpoint knows" in lines[-1]


@pytest.mark.parametrize("content", [b"", b'{"schema": 1', b"[]", b"{}", b'{"schema": 1}'])
def test_a_list_of_dropped_samples(
    data: dict[str, Any], run: Path, start: Start, content: bytes
) -> None:
    """Never passed over: it says what must not be trained on."""
    path = Path(data["data"]["root"], "toy/drops/1.json")
    path.parent.mkdir()
    path.write_bytes(content)
    try:
        code, lines = start()
    finally:
        shutil.rmtree(path.parent)
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"train: {path}: damaged, so nobody can tell what it took out")


@pytest.mark.parametrize("damage", [empty, cut])
def test_weights_of_the_last_stage_are_written_again(
    whole: Path, run: Path, start: Start, damage: Callable[[Path], None]
) -> None:
    model = run / "full/model.safetensors"
    damage(model)
    code, lines = start("logging.every=3")
    assert code == 0
    assert any(line.startswith(f"{model}: it is ") for line in lines)
    for name in ("full/model.safetensors", "model.safetensors"):
        assert equal(run / name, whole / name)


def test_damaged_weights_never_replace_those_of_the_run(
    whole: Path, run: Path, start: Start
) -> None:
    model = run / "full/model.safetensors"
    empty(model)
    for path in (run / "full").glob("*.pt"):
        path.unlink()
    code, lines = start()
    assert code == 2
    assert lines[-1].startswith(f"train: {model}: it is empty, and no checkpoint of the stage is ")
    assert equal(run / "model.safetensors", whole / "model.safetensors")


def test_damaged_weights_of_a_stage_that_another_began_from(
    whole: Path, run: Path, start: Start
) -> None:
    model = run / "masked/model.safetensors"
    empty(model)
    code, lines = start()
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"train: {model} is empty, and stage full began from it; put ")
    assert start("stage=masked")[0] == 0
    assert equal(model, whole / "masked/model.safetensors")
    assert equal(run / "model.safetensors", whole / "model.safetensors")  # not those of masked


@pytest.mark.parametrize("damage", [empty, cut, garble])
def test_the_checkpoint_before_a_damaged_one(
    whole: Path, run: Path, start: Start, damage: Callable[[Path], None]
) -> None:
    (run / "full/model.safetensors").unlink()
    last, before = run / "full/step-00000004.pt", run / "full/step-00000002.pt"
    damage(last)
    code, lines = start()
    assert code == 2
    assert lines[-1].startswith(f"train: {last}: it is ")
    assert f"the one before it is {before}: put a whole copy there, or set che" in lines[-1]
    code, lines = start("checkpoint.skip_damaged=true")
    assert code == 0
    assert "stage full: 4 steps, goes on after 2" in lines
    assert (run / "full/step-00000004.pt.damaged").exists()
    assert equal(run / "model.safetensors", whole / "model.safetensors")


def test_no_checkpoint_before_a_damaged_one(whole: Path, run: Path, start: Start) -> None:
    (run / "full/model.safetensors").unlink()
    (run / "full/step-00000002.pt").unlink()
    cut(run / "full/step-00000004.pt")
    code, lines = start()
    assert code == 2
    assert "none is before it: put a whole copy there, or set checkpoint.skip_dam" in lines[-1]
    assert start("checkpoint.skip_damaged=true")[0] == 0
    assert equal(run / "model.safetensors", whole / "model.safetensors")


def test_the_checkpoint_that_the_next_stage_begins_with(run: Path, start: Start) -> None:
    shutil.rmtree(run / "full")
    garble(run / "masked/step-00000004.pt")
    code, lines = start()
    assert code == 2
    assert lines[-1].startswith(f"train: {run}/masked/step-00000004.pt: it is damaged (")
    assert "and stage full begins with it; put it back, or remove" in lines[-1]


@pytest.mark.parametrize(
    "state",
    [[], 3, {"state": []}, {"state": {"run_name": 3}}, "weights", "callbacks"],
    ids=str,
)
def test_a_whole_file_that_is_no_checkpoint(run: Path, state: Any) -> None:
    path = run / "full/step-00000004.pt"
    if isinstance(state, str):
        whole = torch.load(path, weights_only=True)
        whole["state"]["model" if state == "weights" else "callbacks"] = {"x": 3}
        state = whole
    torch.save(state, path)
    with pytest.raises(SettingError, match=r"step-00000004.pt: no checkpoint of this trainer") as e:
        read(path)
    assert len(str(e.value).splitlines()) == 1


def test_a_damaged_copy_is_not_taken(
    data: dict[str, Any], whole: Path, run: Path, start: Start, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "full/model.safetensors").unlink()
    cut(copy / "full/step-00000004.pt")
    shutil.rmtree(run)
    code, lines = start(f"checkpoint.remote={copy}")
    assert code == 2
    assert lines[-1].startswith(f"train: checkpoint.remote: {copy}/full/step-00000004.pt: it is c")
    assert not (run / "full/step-00000004.pt").exists()
    (copy / "full/step-00000004.pt").unlink()
    assert start(f"checkpoint.remote={copy}")[0] == 0
    assert equal(run / "model.safetensors", whole / "model.safetensors")


def test_a_damaged_checkpoint_is_fetched_again(whole: Path, run: Path, start: Start) -> None:
    (run / "full/model.safetensors").unlink()
    garble(run / "full/step-00000004.pt")
    assert start(f"checkpoint.remote={whole}")[0] == 0
    assert equal(run / "model.safetensors", whole / "model.safetensors")


BROKEN = [b"\xff\xfe\n", b"3\n", b"{}\n", b'{"step": 2, "train/l\n', b'{"step": "2"}\n', b"\n"]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_line_of_a_journal(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [b'{"step": 1, "train/loss": 2.0}\n', broken, b'{"step": 3, "train/loss": null}\n']
    path.write_bytes(b"".join(rows) + b'{"step": 4, "tr')
    assert [row["step"] for row in metrics_log.read(path)] == [1, 3]
    assert metrics_log.last(path, "train/loss") == 2.0
    assert Journal(path).cut(3) == 1
    assert path.read_bytes() == rows[0] + rows[2]
    assert Journal(path).cut(1) == 0
    assert path.read_bytes() == rows[0]


def test_a_stage_goes_on_over_a_broken_journal(run: Path, start: Start) -> None:
    (run / "full/model.safetensors").unlink()
    (run / "full/step-00000004.pt").unlink()
    path = run / "full/metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"step": 1,', b'{"step": 1,{'))
    code, lines = start()
    assert code == 0
    assert "full 2/4  metrics.jsonl: 1 broken lines left out" in lines
    assert [row["step"] for row in metrics_log.read(path)] == [2, 3, 4]

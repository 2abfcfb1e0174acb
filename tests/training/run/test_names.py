"""A run's folder may have any name: it is saved into and resumed from, or refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from composer import Callback

from tests.training.helpers.groups import changed
from tests.training.helpers.runs import equal, make_toy, plan_of
from training.run import trainer
from training.train import main

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own

ALL = "a#3 what?{y}{rank}{0}{}[1]*a%20b;x&y=z@%s$HOME 'q\" \\ naïve-图 e\u0301.pt"
NAMES = [ALL, "lr:3", "s3:x", "{", "-n", "a~b", " ..x ", "x.symlink", "a" * 255]


class Stop(Callback):
    def batch_end(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    raw = make_toy(tmp_path_factory.mktemp("names"), samples=4)
    stages = {"only": {"steps": 4, "save_every": 2, "batch_size": 2}}
    return {**raw, "stages": stages, "evaluate": {"every": 0}}


@pytest.fixture(scope="module")
def whole(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer.run(plan_of(data, run))
    return run / "model.safetensors"


@pytest.mark.parametrize(
    ("name", "where"), [*((name, "relative") for name in NAMES), (ALL, "absolute")]
)
def test_a_name_that_the_file_system_takes(
    data: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    name: str,
    where: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(name) if where == "relative" else tmp_path / name
    logging = {"to": ["tensorboard"]}
    with pytest.raises(KeyboardInterrupt):
        trainer.run(plan_of(data, run, logging=logging), [Stop()])
    assert [path.name for path in (run / "only").glob("*.pt")] == ["step-00000002.pt"]
    remote = {"remote": str(tmp_path / "copies" / name)}
    trainer.run(plan_of(data, run, logging=logging, checkpoint=remote))
    assert "goes on after 2" in capsys.readouterr().err
    assert equal(run / "model.safetensors", whole)
    assert {path.name for path in tmp_path.iterdir()} == {name, "copies"}
    assert [path.name for path in (tmp_path / "copies").iterdir()] == [name]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("folder", "a\nb", "folder 'a\\nb': has characters that cannot be shown"),
        ("folder", "a\udce9", "folder 'a\\udce9': has characters that cannot be shown"),
        ("folder", "s3://bucket/run", "folder s3://bucket/run: a run trains in a local folder; "),
        ("folder", "x" * 256, "File name too long"),
        ("stages", {"cache": {"steps": 1}}, "stages.cache: cache is something else in a run's "),
    ],
)
def test_a_name_that_cannot_be_used(
    data: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    key: str,
    value: Any,
    message: str,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(changed(data, key, value)))
    assert main([str(path)]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line

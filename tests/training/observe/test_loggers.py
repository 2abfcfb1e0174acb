"""A stage is one run and one curve in each logger, however often it was started."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from composer import Callback

from pipeline.core.errors import SettingError
from tests.training.helpers.runs import Poison, make_toy, plan_of
from training.observe.loggers import make_loggers
from training.run import trainer
from training.train import main

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    raw = make_toy(tmp_path_factory.mktemp("loggers"))
    stages = {"only": {"steps": 6, "save_every": 2}}
    return {**raw, "stages": stages, "evaluate": {"every": 0}}


class Stop(Callback):
    """Ends the first start after step 5: the next goes on after 4, and makes it once more."""

    def __init__(self, step: int) -> None:
        self.step = step

    def batch_end(self, state: Any, logger: Any) -> None:
        step = state.timestamp.batch.value
        logger.log_images(np.full((4, 4, 3), step, np.uint8), "sheet", channels_last=True)
        if step == self.step:
            raise KeyboardInterrupt


def trained(data: dict[str, Any], run: Path, to: list[str]) -> Path:
    """A run that was stopped twice, the first time before there was a checkpoint."""
    plan = plan_of(data, run, logging={"to": to, "every_steps": 1})
    for step in (1, 5):
        with pytest.raises(KeyboardInterrupt):
            trainer.run(plan, [Stop(step)])
    trainer.run(plan, [Stop(0)])
    return run / "only"


def tensorboard_steps(folder: Path, tag: str = "train/lr") -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [event.step for event in events.Scalars(tag)]


def test_tensorboard(data: dict[str, Any], tmp_path: Path) -> None:
    stage = trained(data, tmp_path / "run", ["tensorboard"])
    folder = stage / "tensorboard/toy-only"
    assert len(list(folder.iterdir())) == 3
    assert tensorboard_steps(folder) == [1, 2, 3, 4, 5, 6]


def test_tensorboard_after_a_roll_back(data: dict[str, Any], tmp_path: Path) -> None:
    """What is told of the steps after the checkpoint is what was trained."""
    logging = {"to": ["tensorboard"], "every_steps": 1}
    plan = plan_of(data, tmp_path / "run", logging=logging, guard={"in_a_row": 1})
    trainer.run(plan, [Poison([4], "only")])
    assert tensorboard_steps(tmp_path / "run/only/tensorboard/toy-only") == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_weights_and_biases(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: three folders, which `wandb sync` makes one run of."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    stage = trained(data, tmp_path / "run", ["wandb"])
    files = sorted((stage / "wandb").glob("offline-run-*/run-*.wandb"))
    own = json.loads((stage / "loggers.json").read_text())["wandb"]
    assert [file.name for file in files] == [f"run-{own}.wandb"] * 3
    deadline, steps = time.monotonic() + 30, []
    while len(steps) < 6 and time.monotonic() < deadline:  # its service writes behind
        steps = [step for file in files for step in history(file.read_bytes())]
    assert steps == [1, 2, 3, 4, 5, 6]


def history(log: bytes) -> Iterator[int]:
    from wandb.proto import wandb_internal_pb2

    for data in records(log):
        record = wandb_internal_pb2.Record()  # pyright: ignore (made when it is imported)
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


def records(log: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format, behind wandb's own seven bytes."""
    place, record = 7, b""
    while place < len(log):
        length, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        record += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield mlflow
    mlflow.set_tracking_uri(uri)


def test_mlflow(data: dict[str, Any], tmp_path: Path, mlflow: Any) -> None:
    trained(data, tmp_path / "run", ["mlflow"])
    # A second run of that name is a run of its own.
    trained(data, tmp_path / "other", ["mlflow"])
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("toy")
    runs = client.search_runs([experiment.experiment_id])
    assert [(run.info.run_name, run.info.status) for run in runs] == [("only", "FINISHED")] * 2
    assert runs[0].data.params["stages.only.steps"] == "6"
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6]


def test_a_record_that_is_damaged(data: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "loggers.json").touch()
    config = plan_of(data, tmp_path, logging={"to": ["tensorboard"]}).config
    with pytest.raises(SettingError, match=r"loggers.json: empty; remove it, and loggers begin a"):
        make_loggers(config, tmp_path)


def test_a_server_that_is_gone_after_it_was_asked(
    data: dict[str, Any], tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    plan = plan_of(data, tmp_path / "run", logging={"to": ["mlflow"]})
    with pytest.raises(SettingError, match=r"^logging\.to=mlflow: .*; mend it, or leave it out$"):
        trainer.run(plan)


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b'{"errors": [{"message": "permission denied"}]}'
        self.send_response(401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    """The address of a server that takes no key."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "no API key; set WANDB_API_KEY, or WANDB_MODE=offline to write files for `wandb "),
        ("short", "API key must have 40+ characters, has 5.; set WANDB_API_KEY"),
        (40 * "0", "permission denied; set WANDB_API_KEY"),
    ],
)
def test_a_key_that_is_missing_or_wrong(
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    refusing: str,
    key: str,
    message: str,
) -> None:
    """One line within seconds, before anything is trained; in a process of its own, as a session
    of wandb keeps its settings."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", refusing)
    monkeypatch.setenv("WANDB_API_KEY", key)
    path = tmp_path / "run.yaml"
    raw = {**data, "folder": str(tmp_path / "run"), "logging": {"to": ["wandb"]}}
    path.write_text(json.dumps(raw))
    began = time.monotonic()
    assert started(path) == 2
    assert time.monotonic() - began < 30
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("train: logging.to=wandb: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def started(path: Path) -> int:
    import subprocess
    import sys

    from tests.training.helpers.runs import ROOT

    command = [sys.executable, "training/train.py", str(path)]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=120).returncode


def test_an_mlflow_server_that_refuses(
    data: dict[str, Any],
    tmp_path: Path,
    mlflow: Any,
    refusing: str,
    capsys: pytest.CaptureFixture,
) -> None:
    mlflow.set_tracking_uri(refusing.replace("://", "://me:secret@"))
    path = tmp_path / "run.yaml"
    raw = {**data, "folder": str(tmp_path / "run"), "logging": {"to": ["mlflow"]}}
    path.write_text(json.dumps(raw))
    assert main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: logging.to=mlflow: ")
    assert "permission denied" in line
    assert "secret" not in line
    assert not (tmp_path / "run").exists()

"""The trainer end to end on small shards: stages, resume to the bit, what it writes and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.errors import SettingError
from tests.checkout import ROOT
from tests.training.helpers.groups import make_encoders, make_source, settings
from tests.training.helpers.runs import Watch, equal, last_losses, plan_of, run_process
from training.checkpoint.checkpoints import read
from training.checkpoint.run_folder import StageFolder
from training.config.plan import TrainingPlan
from training.data.shared_memory import SHM, run_number
from training.network.dit import MicroDiT
from training.optim.optimizers import learning_rate
from training.run import trainer
from training.train import main
from training.weights import weights_file

# Composer's and streaming's own warnings; ours go through SettingError.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings over shards of the toy source; tests set their own folder."""
    folder = tmp_path_factory.mktemp("trainer")
    encoders = make_encoders(folder / "encoders")
    make_source(folder / "data", encoders)
    make_source(folder / "data", encoders, resolution=128)
    return settings(folder / "data", encoders, folder / "unset")


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
        assert equal(whole / "run" / name, tmp_path / "run" / name), name


@pytest.fixture(scope="module")
def trained(
    data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingPlan, Watch]:
    """A finished run of both stages in this process, and what was watched."""
    plan = plan_of(data, tmp_path_factory.mktemp("trained") / "run")
    watch = Watch()
    trainer.run(plan, [watch])
    return plan, watch


def test_trains_both_stages(trained: tuple[TrainingPlan, Watch]) -> None:
    plan, watch = trained
    losses = watch.losses
    assert {name: len(values) for name, values in losses.items()} == {
        "toy-masked": 10,
        "toy-full": 7,
    }
    assert losses["toy-masked"][0] == pytest.approx(1, abs=0.5)  # F is 0 at initialisation
    for name, stage in plan.config.stages.items():
        expected = [learning_rate(stage, step) for step in range(stage.steps)]
        assert watch.rates[f"toy-{name}"] == expected


def test_what_a_run_leaves(trained: tuple[TrainingPlan, Watch]) -> None:
    plan, _ = trained
    path = plan.config.run_folder()
    files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    stages = [
        f"{stage}/{name}"
        for stage, last in (("full", 7), ("masked", 10))
        for name in (
            "live.safetensors",
            "loss.png",
            "metrics.jsonl",
            "model.safetensors",
            "settings.json",
            f"step-{last:08d}.pt",
        )
    ]
    assert files == sorted(["config.json", "model.safetensors", *stages])
    assert os.path.samefile(path / "model.safetensors", path / "full/model.safetensors")
    network, metadata = weights_file.load(path / "model.safetensors")
    assert (metadata.stage, metadata.step, metadata.weights, metadata.ema) == (
        "full",
        7,
        "ema",
        0.9,
    )
    assert metadata.vae == plan.vae
    assert metadata.latents_manifests["toy"].samples == 60
    assert metadata.text == "trimmed"
    assert metadata.config["stages"]["full"]["lr"] == 1e-2
    assert network.config.caption_width == 16
    live = weights_file.read_metadata(path / "full/live.safetensors")
    assert (live.weights, live.ema) == ("live", None)


def test_checkpoint_keeps_the_average_under_its_own_key(
    trained: tuple[TrainingPlan, Watch],
) -> None:
    path = StageFolder(trained[0].config.run_folder() / "full")
    state = read(path.checkpoint(7))
    live, model = load_file(path.live), load_file(path.model)
    average = state.averages["0.9"]
    assert state.averages.keys() == {"0.9"}
    assert average["updates"] == 17  # of both stages
    parameters = dict(MicroDiT(weights_file.read_metadata(path.model).network()).named_parameters())
    assert average["values"].keys() == parameters.keys()  # and no buffers
    for name in parameters:
        assert torch.equal(state.model[f"dit.{name}"], live[name])
        assert torch.equal(average["values"][name], model[name])
    assert not all(torch.equal(live[name], model[name]) for name in parameters)


def test_finished_stages_are_not_run_again(
    trained: tuple[TrainingPlan, Watch], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Without its last stage a finished run makes just that one again, the same."""
    plan, watch = trained
    copy = tmp_path / "run"
    shutil.copytree(plan.config.run_folder(), copy)
    shutil.rmtree(copy / "full")
    again = Watch()
    trainer.run(plan_of(json.loads(plan.config.model_dump_json()), copy), [again])
    assert again.losses == {"toy-full": watch.losses["toy-full"]}
    assert equal(copy / "model.safetensors", plan.config.run_folder() / "model.safetensors")
    assert "stage masked: finished before, not run again" in capsys.readouterr().err


def test_finished_run_starts_nothing(
    trained: tuple[TrainingPlan, Watch], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plan, _ = trained
    path = tmp_path / "run.yaml"
    path.write_text(plan.config.model_dump_json())
    assert main([str(path)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main([str(path), "stages.full.lr=1e-3"]) == 2
    message = capsys.readouterr().err
    assert "was begun with other settings (stage.lr: 0.01 -> 0.001)" in message
    assert main([str(path), "logging.every=3", "data.workers=1", "stages.full.save_every=9"]) == 0


def test_moments_go_on_where_they_should(
    data: dict[str, Any], trained: tuple[TrainingPlan, Watch], tmp_path: Path
) -> None:
    plan, watch = trained
    copy = tmp_path / "run"
    shutil.copytree(plan.config.run_folder() / "masked", copy / "masked")
    stages = {**data["stages"], "full": data["stages"]["full"] | {"keep_moments": False}}
    fresh = Watch()
    trainer.run(plan_of(data, copy, stages=stages), [fresh])
    kept, reset = watch.losses["toy-full"], fresh.losses["toy-full"]
    assert kept[0] == reset[0]  # the same weights and noise
    assert kept[2] != reset[2]  # another step was made with other moments


def test_resolution_may_change_between_stages(data: dict[str, Any], tmp_path: Path) -> None:
    stages = {"small": {"steps": 2}, "large": {"steps": 2, "resolution": 128}}
    plan = plan_of(data, tmp_path / "run", stages=stages)
    trainer.run(plan)
    small, metadata = weights_file.load(tmp_path / "run/small/model.safetensors")
    large, larger = weights_file.load(tmp_path / "run/large/model.safetensors")
    assert (metadata.resolution, small.config.input_size, small.config.pos_interp_scale) == (
        64,
        8,
        1,
    )
    assert (larger.resolution, large.config.input_size, large.config.pos_interp_scale) == (
        128,
        16,
        2,
    )
    grid = large.pos_embed.unflatten(1, (8, 8))[:, ::2, ::2].flatten(1, 2)
    assert torch.equal(grid, small.pos_embed)


def test_micro_batches_do_not_change_the_result(
    data: dict[str, Any], trained: tuple[TrainingPlan, Watch], tmp_path: Path
) -> None:
    watch = Watch()
    stages = {"masked": data["stages"]["masked"] | {"microbatch": 4}}
    trainer.run(plan_of(data, tmp_path / "run", stages=stages), [watch])
    expected = trained[1].losses["toy-masked"]
    assert watch.losses["toy-masked"] == pytest.approx(expected, rel=1e-3)


def test_no_room_for_a_checkpoint(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.run import stage_callbacks

    save = stage_callbacks.save_checkpoint

    def full_disk(state, filename, **options):
        if state.timestamp.batch.value > 4:
            Path(filename).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(state, filename, **options)

    monkeypatch.setattr(stage_callbacks, "save_checkpoint", full_disk)
    with pytest.raises(SettingError, match=r"No space left on device; the last good .*00004.pt"):
        trainer.run(plan_of(data, tmp_path / "run"))
    files = sorted(path.name for path in (tmp_path / "run/masked").iterdir())
    assert files == ["metrics.jsonl", "settings.json", "step-00000004.pt"]


def test_tensorboard(data: dict[str, Any], tmp_path: Path) -> None:
    stages = {"masked": data["stages"]["masked"] | {"steps": 5, "clip": 1.0}}
    plan = plan_of(
        data, tmp_path / "run", stages=stages, logging={"to": ["tensorboard"], "every_steps": 2}
    )
    trainer.run(plan)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/masked/tensorboard/toy-masked")).Reload()
    names = events.Tags()["scalars"]
    expected = ("loss", "loss_mean", "lr", "grad_norm", "samples_per_second", "tflops_per_device")
    assert {f"train/{name}" for name in expected} <= {*names}
    assert {"train/data_wait_share", "train/device_hours", "eval/live/mean", "eval/ema/q06"} <= {
        *names
    }
    assert [event.step for event in events.Scalars("train/lr")] == [2, 4, 5]


def test_one_stage_alone(
    data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """`stage=`: the others are left as they are; together they are the run of all."""
    stages = {name: {**data["stages"][name], "steps": 4} for name in ("masked", "full")}
    path, run = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(json.dumps({**data, "stages": stages, "folder": str(run)}))
    assert main([str(path), "stage=full"]) == 2
    assert "stage=full: goes on from stage masked, which is not finis" in capsys.readouterr().err
    assert main([str(path), "stage=masked"]) == 0
    assert f"stage masked of {run} is finished" in capsys.readouterr().out
    assert not (run / "full").exists()
    assert main([str(path), "stage=full"]) == 0
    trainer.run(plan_of(data, tmp_path / "whole", stages=stages))
    assert equal(run / "model.safetensors", tmp_path / "whole/model.safetensors")


def test_a_kill_before_the_runs_weights_are_linked(
    data: dict[str, Any], trained: tuple[TrainingPlan, Watch], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0].config.run_folder(), run)
    shutil.copy(run / "masked/model.safetensors", run / "model.safetensors")
    os.utime(run / "model.safetensors", (0, 0))  # of the stage before, and older
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**data, "folder": str(run)}))
    assert main([str(path)]) == 0
    assert os.path.samefile(run / "model.safetensors", run / "full/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "precision", "steps"), [(1, "auto", 5), (2, "fp64", 20)], ids=["one", "two"]
)
def test_the_launcher(
    data: dict[str, Any], tmp_path: Path, ranks: int, precision: str, steps: int
) -> None:
    """`composer -n N training/train.py` ends with the plain run's weights: the same bits on one
    rank, and on two, over four epochs, what differs is the order of float64 sums alone. In float32
    that is enough to route a token to another expert."""
    stages = {"masked": data["stages"]["masked"] | {"steps": steps}}
    raw = {**data, "stages": stages, "precision": precision}
    trainer.run(plan_of(raw, tmp_path / "alone"))
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw | {"folder": str(tmp_path / "run")}))
    composer = Path(sys.executable).parent / "composer"
    command = [composer, "-n", str(ranks), "training/train.py", path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    losses = [
        [json.loads(line)["train/loss"] for line in (run / "masked/metrics.jsonl").open()]
        for run in (tmp_path / "alone", tmp_path / "run")
    ]
    assert len(losses[0]) == steps
    assert losses[1] == (losses[0] if ranks == 1 else pytest.approx(losses[0], rel=1e-6))
    for file in ("live.safetensors", "model.safetensors"):
        expected = load_file(tmp_path / "alone/masked" / file)
        found = load_file(tmp_path / "run/masked" / file)
        for name, value in expected.items():
            assert value.dtype == (torch.float32 if precision == "auto" else torch.float64)
            if ranks == 1:
                assert torch.equal(found[name], value), name
            else:
                assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["composer", "python"])
def test_a_kill_leaves_nothing_to_the_next_start(
    data: dict[str, Any], tmp_path: Path, launcher: str
) -> None:
    """SIGKILL for all processes at once: what they leave in /dev/shm goes with the next start."""
    stages = {"masked": data["stages"]["masked"] | {"steps": 60, "save_every": 10}}
    raw = {**data, "stages": stages, "data": data["data"] | {"workers": 2}}
    path, run = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(json.dumps(raw | {"folder": str(run)}))
    starts = {
        "composer": [Path(sys.executable).parent / "composer", "-n", "2"],
        "python": [sys.executable],
    }
    command = [*starts[launcher], "training/train.py", path]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not StageFolder(run / "masked").checkpoints():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        # The launcher gives its ranks sessions of their own.
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        process.wait()
    places = [SHM, Path(tempfile.gettempdir())]
    names = f"{run_number(run)}*"
    left = [path.name for place in places for path in place.glob(names)]
    assert any(name.endswith("_locals") for name in left)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "goes on after" in result.stderr
    assert [path.name for place in places for path in place.glob(names)] == []


@pytest.mark.slow
def test_the_launcher_keeps_the_exit_code(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "composer", "training/train.py", "yamls/1b.yaml"]
    result = subprocess.run(
        [*command, f"data.root={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert sum(line.startswith("train: ") for line in result.stderr.splitlines()) == 1
    assert "run `pipeline run encode --source sa1b" in result.stderr

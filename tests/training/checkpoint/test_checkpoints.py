"""Checkpoints and weights that are not the stage's own, or more than data: refused in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.errors import SettingError
from tests.training.helpers.groups import make_encoders, make_source, settings
from tests.training.helpers.runs import Watch, equal, plan_of
from training.checkpoint.checkpoints import allow_only_data
from training.config.plan import TrainingPlan
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
def trained(
    data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingPlan, Watch]:
    """A finished run of both stages in this process, and what was watched."""
    plan = plan_of(data, tmp_path_factory.mktemp("trained") / "run")
    watch = Watch()
    trainer.run(plan, [watch])
    return plan, watch


class Evil:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "code ran"))


@pytest.mark.parametrize("kind", ["truncated", "evil", "hidden", "other"])
def test_unusable_checkpoints(
    data: dict[str, Any], trained: tuple[TrainingPlan, Watch], tmp_path: Path, kind: str
) -> None:
    """Where a stage would go on from one, and where the next stage would begin with one."""
    source = trained[0].config.run_folder()
    good = source / "masked/step-00000010.pt"
    bad, sign = tmp_path / "bad.pt", tmp_path / "sign"
    if kind == "truncated":
        bad.write_bytes(good.read_bytes()[:50_000])
    elif kind == "evil":
        torch.save({"state": {"model": Evil(sign)}}, bad)
    elif kind == "hidden":  # beside all that a whole checkpoint has
        state = torch.load(good, weights_only=True)
        state["state"]["callbacks"]["Evil"] = Evil(sign)
        torch.save(state, bad)
    else:
        torch.save({"state": {"something": 1}}, bad)
    for stage, step in (("full", 4), ("masked", 10)):
        copy = tmp_path / stage
        shutil.copytree(source, copy)
        shutil.rmtree(copy / "full")
        (copy / stage).mkdir(exist_ok=True)
        shutil.copy(bad, copy / stage / f"step-{step:08d}.pt")
        with pytest.raises(SettingError, match=rf"step-{step:08d}.pt") as error:
            trainer.run(plan_of(data, copy))
        assert len(str(error.value).splitlines()) == 1
        assert ("holds pickled objects" in str(error.value)) == (kind in ("evil", "hidden"))
    assert not sign.exists()


@pytest.mark.parametrize(("stage", "step"), [("full", 4), ("masked", 10)])
def test_a_checkpoint_of_another_stage(
    data: dict[str, Any], trained: tuple[TrainingPlan, Watch], tmp_path: Path, stage: str, step: int
) -> None:
    """Where a stage would go on from it, and where the next stage would begin with it."""
    source = trained[0].config.run_folder()
    other = {"full": "masked/step-00000010.pt", "masked": "full/step-00000007.pt"}[stage]
    copy = tmp_path / "run"
    shutil.copytree(source, copy)
    shutil.rmtree(copy / "full")
    (copy / stage).mkdir(exist_ok=True)
    shutil.copy(source / other, copy / stage / f"step-{step:08d}.pt")
    with pytest.raises(SettingError, match=rf"is of run toy-\w+, not of stage {stage}; "):
        trainer.run(plan_of(data, copy))


def test_stages_whose_names_end_alike(data: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint of `512-full` in the folder of `full`: what it was begun with tells them
    apart."""
    stages = {"full": {"steps": 2, "save_every": 1}, "512-full": {"steps": 1}}
    run, changes = tmp_path / "run", {"stages": stages, "evaluate": {"every": 0}}
    trainer.run(plan_of(data, run, **changes))
    shutil.move(run / "512-full/step-00000001.pt", run / "full/step-00000001.pt")
    shutil.rmtree(run / "512-full")
    for name in ("model.safetensors", "step-00000002.pt"):
        (run / "full" / name).unlink()
    with pytest.raises(SettingError, match=r"step-00000001.pt: is of a stage that was begun with"):
        trainer.run(plan_of(data, run, **changes))


def test_a_stage_is_tied_to_the_weights_that_it_began_from(
    data: dict[str, Any],
    trained: tuple[TrainingPlan, Watch],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    source, run, path = trained[0].config.run_folder(), tmp_path / "run", tmp_path / "run.yaml"
    path.write_text(json.dumps({**data, "folder": str(run)}))
    shutil.copytree(source, run)
    (run / "full/model.safetensors").unlink()  # so that it would go on from its checkpoint

    def answer() -> str:
        assert main([str(path)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    shutil.rmtree(run / "masked")
    assert (
        f"masked/model.safetensors is missing, and stage full began from it; put {run}" in answer()
    )
    # The same stage of the same settings, trained elsewhere with other results.
    shutil.copytree(source / "masked", run / "masked")
    metadata = weights_file.read_metadata(source / "masked/model.safetensors")
    changed = {k: v + 1 for k, v in load_file(source / "masked/model.safetensors").items()}
    weights_file.write(run / "masked/model.safetensors", changed, metadata)
    assert "holds other weights than those that stage full began from (sha256 " in answer()
    shutil.copy(source / "masked/model.safetensors", run / "masked/model.safetensors")
    assert main([str(path)]) == 0
    assert equal(run / "model.safetensors", source / "model.safetensors")


def test_a_checkpoint_of_other_weights_than_its_stages(
    data: dict[str, Any], trained: tuple[TrainingPlan, Watch], tmp_path: Path
) -> None:
    """The next stage begins with the checkpoint, and is tied to the weights beside it."""
    copy = tmp_path / "run"
    shutil.copytree(trained[0].config.run_folder() / "masked", copy / "masked")
    file = copy / "masked/step-00000010.pt"
    state = torch.load(file, weights_only=True)
    state["state"]["model"]["dit.x_embedder.proj.bias"] += 1
    torch.save(state, file)
    with pytest.raises(SettingError, match=r"holds other weights than .*/live.safetensors \(x_emb"):
        trainer.run(plan_of(data, copy))
    live = copy / "masked/live.safetensors"
    live.write_bytes(live.read_bytes()[:50])
    with pytest.raises(SettingError, match=r"live.safetensors \(no whole file\)"):
        trainer.run(plan_of(data, copy))


def test_a_finished_stage_can_do_without_its_live_weights(
    data: dict[str, Any], trained: tuple[TrainingPlan, Watch], tmp_path: Path
) -> None:
    """Who wants their room deletes them: the checkpoint has them, and the average is no check."""
    source, copy = trained[0].config.run_folder(), tmp_path / "run"
    shutil.copytree(source / "masked", copy / "masked")
    (copy / "masked/live.safetensors").unlink()
    trainer.run(plan_of(data, copy))
    assert equal(copy / "model.safetensors", source / "model.safetensors")


def test_loading_runs_no_code(tmp_path: Path) -> None:
    """Composer calls torch.load with weights_only=False; the variable overrules it."""
    torch.save(Evil(tmp_path / "sign"), tmp_path / "evil.pt")
    allow_only_data()
    with pytest.raises(Exception, match=r"[Ww]eights"):
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert not (tmp_path / "sign").exists()

"""Runs with flow, Muon, several averages and both fidelities, from shards to pictures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback
from PIL import Image
from safetensors.torch import load_file

from pipeline.core.errors import SettingError
from tests.checkout import ROOT
from tests.training.helpers.groups import SHIPPED, make_source, settings
from training.checkpoint.checkpoints import read
from training.config.load import resolve
from training.config.plan import TrainingPlan
from training.config.settings import Muon, Optimizer
from training.generate import main as generate
from training.masking.deferred import Deferred
from training.network.config import DiTConfig
from training.network.dit import MicroDiT
from training.network.moe import ExpertChoiceMLP
from training.objectives.edm import EDM
from training.objectives.flow import Flow
from training.optim.optimizers import learning_rate, make_optimizer
from training.run import trainer
from training.run.preflight import check
from training.weights import weights_file

# Composer's and streaming's own warnings; ours go through SettingError.
pytestmark = pytest.mark.filterwarnings("ignore")

FLOW_AND_MUON: dict[str, Any] = {"objective": "flow", "optimizer": {"muon": {}}}


class Interrupted(Exception):
    """Ends a run in the middle of a stage."""


class Watch(Callback):
    """Losses of every step by place, and the rates of all groups; stops where it is told to."""

    def __init__(self, stop_after: str = "") -> None:
        self.losses: dict[str, float] = {}
        self.rates: list[list[float]] = []
        self.stop_after = stop_after

    def batch_end(self, state, logger) -> None:
        place = f"{state.run_name} {state.timestamp.batch.value}"
        self.losses[place] = state.total_loss_dict["loss/train/total"]
        self.rates.append([group["lr"] for group in state.optimizers[0].param_groups])

    def batch_checkpoint(self, state, logger) -> None:
        if self.stop_after == f"{state.run_name} {state.timestamp.batch.value}":
            raise Interrupted


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings over shards of the toy source; tests set their own folder."""
    folder = tmp_path_factory.mktemp("recipes")
    make_source(folder / "data", SHIPPED)
    raw = settings(folder / "data", SHIPPED, folder / "unset")
    raw["defaults"] |= {"ema": [0.9, {"power": 0.1}], "save_every": 2, "lr": 3e-3}
    raw["model"]["mixer_depth"] = 2  # the second block has experts
    raw["stages"]["masked"]["steps"] = 6
    raw["stages"]["full"] = {"steps": 5, "keep_moments": True, "clip": 1.0}
    return raw


def plan_of(data: dict[str, Any], path: Path, **changes: Any) -> TrainingPlan:
    return check(resolve({**data, "folder": str(path), **changes}))


@pytest.fixture(scope="module")
def whole(
    data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingPlan, Watch]:
    """An uninterrupted run with flow and Muon."""
    plan = plan_of(data, tmp_path_factory.mktemp("whole") / "run", **FLOW_AND_MUON)
    watch = Watch()
    trainer.run(plan, [watch])
    return plan, watch


def same_weights(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_interrupted_and_resumed_equals_uninterrupted(
    data: dict[str, Any], whole: tuple[TrainingPlan, Watch], tmp_path: Path
) -> None:
    """To the last bit: Muon's momentum, both kinds of averages and flow's draws go on."""
    plan, losses = plan_of(data, tmp_path / "run", **FLOW_AND_MUON), {}
    for place in ("toy-masked 3", "toy-full 3", ""):
        watch = Watch(stop_after=place)
        if place:
            with pytest.raises(Interrupted):
                trainer.run(plan, [watch])
        else:
            trainer.run(plan, [watch])
        losses |= watch.losses
    assert losses == whole[1].losses
    names = [
        f"{stage}/{name}.safetensors"
        for stage in ("masked", "full")
        for name in ("model", "live", "ema-power-0.1")
    ]
    for name in names:
        assert same_weights(whole[0].config.run_folder() / name, tmp_path / "run" / name), name


@pytest.mark.parametrize("muon", [None, Muon()], ids=["adamw", "muon"])
@pytest.mark.parametrize("denoiser", [EDM(), Flow(shift=2.0)], ids=["edm", "flow"])
def test_learns(denoiser: EDM | Flow, muon: Muon | None) -> None:
    """Every objective with every optimizer: four pictures of one colour, each with a caption."""
    sizes: dict[str, Any] = {"width": 32, "depth": 2, "head_dim": 16, "multiple_of": 16}
    config = DiTConfig(
        **sizes, input_size=8, mixer_width=32, mixer_depth=2, num_experts=2, caption_width=8
    )
    network, generator = MicroDiT(config), torch.Generator().manual_seed(0)
    network.initialise(generator)
    latents = 0.9 * torch.randn(4, 4, 1, 1, generator=generator).expand(4, 4, 8, 8)
    y = torch.randn(4, 3, 8, generator=generator)
    optimizer = make_optimizer(network, Optimizer(muon=muon), 5e-3)

    def loss(generator: torch.Generator) -> torch.Tensor:
        level = denoiser.level(torch.randn(4, generator=generator))
        eps = torch.randn(latents.shape, generator=generator)
        mask = Deferred().draw(torch.rand(4, 16, generator=generator), 0.5)
        return denoiser.loss(network, latents, level, eps, y, mask=mask).mean()

    def check_loss() -> float:
        with torch.no_grad():
            return sum(loss(torch.Generator().manual_seed(i)).item() for i in range(20)) / 20

    before = check_loss()
    for _ in range(50):
        optimizer.zero_grad()
        loss(generator).backward()
        optimizer.step()
    assert check_loss() < 0.8 * before


def test_what_a_run_with_several_averages_leaves(whole: tuple[TrainingPlan, Watch]) -> None:
    folder = whole[0].config.run_folder() / "full"
    kept = read(folder / "step-00000005.pt").averages
    assert list(kept) == ["0.9", "power-0.1"]
    for file, kind, ema, name in (
        ("model", "ema", 0.9, "0.9"),
        ("ema-power-0.1", "ema", "power-0.1", "power-0.1"),
        ("live", "live", None, ""),
    ):
        network, metadata = weights_file.load(folder / f"{file}.safetensors")
        assert (metadata.weights, metadata.ema) == (kind, ema)
        assert metadata.noise() == Flow()
        if name:
            assert kept[name]["updates"] == 11  # of both stages
            for key, value in network.named_parameters():
                assert torch.equal(value, kept[name]["values"][key])
    assert not same_weights(folder / "model.safetensors", folder / "ema-power-0.1.safetensors")
    assert not same_weights(folder / "model.safetensors", folder / "live.safetensors")


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_a_flow_model_generates(
    whole: tuple[TrainingPlan, Watch], tmp_path: Path, solver: str
) -> None:
    run = whole[0].config.run_folder()
    for checkpoint in (run, run / "full/ema-power-0.1.safetensors"):
        arguments = ["--checkpoint", str(checkpoint), "--out", str(tmp_path), "--steps", "3"]
        assert generate([*arguments, "--solver", solver, "--prompts", "rocket"]) == 0
        picture = Image.open(tmp_path / "0000-rocket.png")
        assert picture.size == (64, 64)
        assert len(picture.getcolors() or range(9999)) > 10  # no single colour
        assert picture.info["solver"] == solver


def test_moments_of_muon_go_on(
    data: dict[str, Any], whole: tuple[TrainingPlan, Watch], tmp_path: Path
) -> None:
    stages = {**data["stages"], "full": data["stages"]["full"] | {"keep_moments": False}}
    shutil.copytree(whole[0].config.run_folder() / "masked", tmp_path / "masked")
    fresh = Watch()
    trainer.run(plan_of(data, tmp_path, stages=stages, **FLOW_AND_MUON), [fresh])
    kept = whole[1].losses
    assert kept["toy-full 1"] == fresh.losses["toy-full 1"]  # the same weights and noise
    assert kept["toy-full 3"] != fresh.losses["toy-full 3"]


@pytest.mark.slow
def test_two_ranks_share_muon(data: dict[str, Any], tmp_path: Path) -> None:
    """Both stages on two ranks, moments handed over: one rank's weights, to rounding."""
    model = data["model"] | {"mixer_depth": 1}  # no experts: routing flips on ties
    raw = {**data, **FLOW_AND_MUON, "model": model}
    trainer.run(plan_of(raw, tmp_path / "alone"))
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw | {"folder": str(tmp_path / "run")}))
    command = [Path(sys.executable).parent / "composer", "-n", "2", "training/train.py", path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    expected = load_file(tmp_path / "alone/full/live.safetensors")
    found = load_file(tmp_path / "run/full/live.safetensors")
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-3), name


def test_moments_do_not_go_over_to_another_optimizer(
    data: dict[str, Any], whole: tuple[TrainingPlan, Watch], tmp_path: Path
) -> None:
    shutil.copytree(whole[0].config.run_folder() / "masked", tmp_path / "masked")
    with pytest.raises(SettingError) as error:
        trainer.run(plan_of(data, tmp_path, objective="flow"))
    message = str(error.value)
    assert "has moments of Muon, which AdamW cannot go on with; set keep_moments=false" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("fidelity", ["intended", "released"])
def test_fidelity(data: dict[str, Any], tmp_path: Path, fidelity: str) -> None:
    """intended: experts at half the rate at every step, averages; released: neither."""
    plan = plan_of(data, tmp_path, fidelity=fidelity, stages={"masked": data["stages"]["masked"]})
    watch, intended = Watch(), fidelity == "intended"
    trainer.run(plan, [watch])
    stage = plan.config.stages["masked"]
    rates = [learning_rate(stage, step) for step in range(stage.steps)]
    assert watch.rates == [[rate, rate * 0.5] if intended else [rate] for rate in rates]
    files = {path.name for path in (tmp_path / "masked").glob("*.safetensors")}
    averaged = {"live.safetensors", "ema-power-0.1.safetensors"} if intended else set()
    assert files == {"model.safetensors"} | averaged
    network, metadata = weights_file.load(tmp_path / "model.safetensors")
    assert metadata.weights == ("ema" if intended else "live")
    if intended:
        checkpoint = read(tmp_path / "masked/step-00000006.pt")
        _, slow = checkpoint.optimizers["AdamW"]["param_groups"]
        assert slow["params"] == [f"dit.{name}" for name in expert_names(network)]


def expert_names(network: MicroDiT) -> list[str]:
    """Of all parameters of the mixtures of experts, in the order of the network."""
    layers = {m for m in network.modules() if isinstance(m, ExpertChoiceMLP)}
    mine = {id(p) for layer in layers for p in layer.parameters()}
    return [name for name, p in network.named_parameters() if id(p) in mine]

"""A run that starts from weights: they are taken as they are, and only where they fit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Logger, State
from safetensors.torch import load_file, save_file

from pipeline.core.errors import SettingError
from tests.checkout import ROOT
from tests.training.helpers.groups import Encoders, changed, make_encoders, make_source, settings
from tests.training.weights.test_official import Evil
from training.checkpoint import run_folder
from training.config.load import load, resolve
from training.config.plan import TrainingPlan, network_config
from training.network.config import MODELS
from training.objectives.edm import EDM
from training.objectives.flow import Flow
from training.run import trainer
from training.run.preflight import check
from training.train import main
from training.weights import weights_file

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own

STAGE = {"full": {"steps": 2, "warmup": 0}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings over shards of two resolutions; tests set their own folder."""
    folder = tmp_path_factory.mktemp("shards")
    encoders = make_encoders(folder / "encoders")
    make_source(folder / "data", encoders)
    make_source(folder / "data", encoders, resolution=128)
    return settings(folder / "data", encoders, folder / "unset") | {"stages": STAGE}


@pytest.fixture(scope="module")
def trained(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    path = tmp_path_factory.mktemp("trained") / "run"
    trainer.run(check(resolve({**data, "folder": str(path)})))
    return path


def plan_of(data: dict[str, Any], path: Path, start: Path, **changes: Any) -> TrainingPlan:
    return check(resolve({**data, "folder": str(path), "init_from": str(start), **changes}))


class First(Callback):
    """The weights before the first step."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        tensors = state.model.state_dict()
        self.state = {k.removeprefix("dit."): v.clone() for k, v in tensors.items()}


@pytest.mark.parametrize("kind", ["run", "file"])
def test_starts_from_the_weights(
    data: dict[str, Any], trained: Path, tmp_path: Path, kind: str
) -> None:
    start, first = trained if kind == "run" else trained / "full/model.safetensors", First()
    trainer.run(plan_of(data, tmp_path / "run", start, seed=99), [first])
    own = load_file(trained / "model.safetensors")
    assert first.state.keys() == own.keys()
    assert all(torch.equal(first.state[name], value) for name, value in own.items())
    after = load_file(tmp_path / "run/model.safetensors")
    assert not torch.equal(after["blocks.0.mlp.w1.weight"], own["blocks.0.mlp.w1.weight"])


def test_positions_are_derived_for_another_resolution(
    data: dict[str, Any], trained: Path, tmp_path: Path
) -> None:
    """The weights' scale stays: at twice the resolution the table spans the same range."""
    first = First()
    stages = {"full": STAGE["full"] | {"resolution": 128}}
    plan = plan_of(data, tmp_path / "run", trained, stages=stages)
    assert plan.config.model.base_resolution == 64
    trainer.run(plan, [first])
    own = load_file(trained / "model.safetensors")
    grid = first.state["pos_embed"].unflatten(1, (8, 8))[:, ::2, ::2].flatten(1, 2)
    assert torch.equal(grid, own["pos_embed"])
    assert all(
        torch.equal(first.state[name], value) for name, value in own.items() if name != "pos_embed"
    )


def test_content_decides_not_the_path(
    data: dict[str, Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy.safetensors"
    trainer.run(plan_of(data, run, trained))
    begun = json.loads((run / "full/settings.json").read_text())
    assert len(begun["init_from"]) == 64
    shutil.copy(trained / "model.safetensors", copy)
    run_folder.check(plan_of(data, run, copy))
    tensors = load_file(copy)
    tensors["x_embedder.proj.bias"] += 1
    weights_file.write(copy, tensors, weights_file.read_metadata(trained / "model.safetensors"))
    with pytest.raises(SettingError, match=r"begun with other settings \(init_from: \w+ -> \w+\)"):
        run_folder.check(plan_of(data, run, copy))
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**data, "folder": str(run)}))
    assert main([str(path)]) == 2  # without init_from
    assert "init_from: " in capsys.readouterr().err
    path.write_text(json.dumps({**data, "folder": str(trained)}))
    assert main([str(path)]) == 0  # a run without it has no such setting


def test_weights_of_another_kind(
    data: dict[str, Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refused(message: str, start: Path = trained, **changes: Any) -> None:
        path = tmp_path / "run.yaml"
        raw = {**data, "folder": str(tmp_path / "run"), "init_from": str(start), **changes}
        path.write_text(json.dumps(raw))
        assert main([str(path)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert message in lines[0]

    model = data["model"]
    refused("weights of another architecture (depth: 2, this run's 3)", model={**model, "depth": 3})
    refused("(expert_capacity: 2.0, this run's 1.0)", model={**model, "expert_capacity": 1.0})
    refused("edm.sigma_data=0.5: init_from=", edm={"sigma_data": 0.5})
    refused("objective=flow: init_from=", objective="flow")
    refused("train: init_from=nothing: no file nothing", Path("nothing"))
    root, names = (
        Path(data["data"]["root"]),
        Encoders(data["data"]["vae"], data["data"]["text_encoder"]),
    )
    make_source(root, names, text="full")
    refused("data.text=full: init_from=", data={**data["data"], "text": "full"})
    other = make_encoders(tmp_path / "other")
    config = json.loads(Path(other.vae, "config.json").read_text())
    Path(other.vae, "config.json").write_text(json.dumps(config | {"scaling_factor": 0.75}))
    make_source(tmp_path / "data", other)
    shards = {**data["data"], "root": str(tmp_path / "data"), "vae": other.vae}
    shards["text_encoder"] = other.text
    refused("scale: expected 0.75, found 0.5", data=shards)


def test_files_that_are_no_weights(
    data: dict[str, Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sign, start = tmp_path / "sign", tmp_path / "start"
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**data, "folder": str(tmp_path / "run"), "init_from": str(start)}))

    def answer() -> str:
        assert main([str(path)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    whole = (trained / "model.safetensors").read_bytes()
    start.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in answer()
    torch.save({"x": Evil(sign)}, start)
    assert "has to be imported first: python -m training.convert import" in answer()
    assert not sign.exists()
    save_file(load_file(trained / "model.safetensors"), start)
    assert "no metadata in it" in answer()
    save_file({}, start, {weights_file.METADATA_KEY: "{}"})
    assert "broken metadata (run is missing)" in answer()
    metadata = weights_file.read_metadata(trained / "model.safetensors")
    tensors = load_file(trained / "model.safetensors")
    tensors["pos_embed"][0, 0, 0] = float("nan")
    weights_file.write(start, tensors, metadata)
    assert "values of pos_embed are NaN or infinite" in answer()
    weights_file.write(start, tensors | {"more": torch.zeros(1)}, metadata)
    assert "more is (1,), expected missing" in answer()
    assert not (tmp_path / "run").exists()


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Settings that do not say these of `data`, nor anything of the network."""
    data = {key: value for key, value in raw["data"].items() if key not in keys}
    return {key: value for key, value in raw.items() if key != "model"} | {"data": data}


def test_what_is_not_said_is_the_weights_own(
    data: dict[str, Any], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start: dict[str, Any] = {"init_from": str(trained)}
    said = resolve({**data, **start})
    raw = without(data, "vae", "text_encoder", "text") | start
    assert resolve(raw) == said
    monkeypatch.setenv("HOME", str(trained.parent))
    assert resolve(raw | {"init_from": "~/run"}) == said
    taken_back: dict[str, Any] = {"vae": None, "text_encoder": None, "text": None}
    assert resolve(raw | {"model": {"arch": None}, "data": raw["data"] | taken_back}) == said
    assert check(resolve(raw)).data.keys() == {"full"}
    with pytest.raises(SettingError, match=r"data.vae: missing(.|\n)*model: missing"):
        resolve(without(data, "vae"))

    metadata = weights_file.read_metadata(trained / "model.safetensors")
    fields = {"in_channels": 4, "caption_width": 16, "caption_length": 12, "input_size": 8}
    for network, model in (
        (MODELS["MicroDiT_XL_2"], {"arch": "MicroDiT_XL_2"}),
        (replace(MODELS["MicroDiT_XL_2"], depth=4), {"arch": "custom", "depth": 4, "width": 1024}),
    ):
        own = {
            "model": asdict(replace(network, **fields)),
            "objective": {"name": "flow", **asdict(Flow())},
        }
        flow = metadata.model_copy(update=own)
        weights_file.write(tmp_path / "start", {"x": torch.ones(1)}, flow)
        config = resolve(raw | {"init_from": str(tmp_path / "start")})
        assert model.items() <= config.model.model_dump().items()
        assert (config.objective, config.edm) == ("flow", None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", {"arch": "MicroDiT_Tiny_2"}, "another architecture (width: 32, this run's 512)"),
        ("model", {"depth": 3}, "another architecture (depth: 2, this run's 3)"),
        ("data.vae", "ostris16", "channels: expected 16, found 4"),
        ("data.text_encoder", "dfn5b-h14", "width: expected 1024, found 16"),
        ("data.text", "full", "data.text=full: init_from="),
        ("objective", "flow", "objective=flow: init_from="),
        ("edm.sigma_data", 0.5, "edm.sigma_data=0.5: init_from="),
    ],
)
def test_what_is_said_and_differs_is_found_before_data(
    data: dict[str, Any], trained: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    raw = changed(without(data, "vae", "text_encoder", "text"), "data.root", str(tmp_path / "none"))
    raw["init_from"] = str(trained)
    with pytest.raises(SettingError, match=re.escape(message)):
        check(resolve(changed(raw, key, value)))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tune", ["1b.yaml", "data.text=full", "stage=512-full"]),  # what was released
        ("tune-demo", ["demo.yaml", "stage=full"]),
    ],
)
def test_shipped_settings_say_nothing_that_the_weights_say(
    tmp_path: Path, name: str, arguments: list[str]
) -> None:
    yamls = ROOT / "yamls"
    file, *changes = arguments
    own = check(load([str(yamls / file), *changes, "data.root=/nowhere"]), need_data=False)
    stage = own.config.stages[own.config.stage]
    network = network_config(own, stage)
    metadata = weights_file.WeightsMetadata(
        run="x",
        stage=own.config.stage,
        step=stage.steps,
        weights="live",
        ema=None,
        model=asdict(network),
        objective={"name": "edm", **asdict(EDM())},
        resolution=stage.resolution,
        vae=own.vae,
        text_encoder=own.text,
        text=own.config.data.text,
        captions="alt",
        latents_manifests={},
        text_manifests={},
        attribution=[],
        config={},
    )
    weights_file.write(tmp_path / "start", {"x": torch.ones(1)}, metadata)
    start = [f"init_from={tmp_path / 'start'}", "data.root=/nowhere"]
    plan = check(load([str(yamls / f"{name}.yaml"), *start]), need_data=False)
    assert plan.config.name == name
    assert (plan.config.data.vae, plan.config.data.text) == (own.vae.name, own.config.data.text)
    first = next(iter(plan.config.stages.values()))
    assert network_config(plan, first) == network
    assert network.pos_interp_scale == (2.0 if name == "tune" else 1.0)

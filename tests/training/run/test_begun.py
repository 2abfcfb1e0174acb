"""What a stage is held to: settings that differ, not settings that were not there yet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import create_model

from pipeline.core.errors import SettingError
from tests.training.helpers.groups import changed
from tests.training.helpers.runs import make_toy, plan_of
from training.checkpoint import run_folder
from training.config import load, settings, stage_settings
from training.run import trainer
from training.train import main

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    raw = make_toy(tmp_path_factory.mktemp("begun"))
    stages = {
        "masked": raw["stages"]["masked"] | {"steps": 2, "warmup": 0, "ema": [0.9, {"power": 0.1}]},
        "full": {"steps": 2},
        "last": {"steps": 2},
    }
    optimizer = {"muon": {}, "expert_lr": 0.25}
    return {**raw, "stages": stages, "optimizer": optimizer, "evaluate": {"every": 0}}


@pytest.fixture(scope="module")
def whole(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer.run(plan_of(data, run))
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A run whose last stage is left to be trained."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "last")
    return run


def forget(run: Path, stage: str, *keys: str) -> None:
    """Makes the stage's record that of a version which did not know these settings."""
    path = run / stage / "settings.json"
    record = json.loads(path.read_text())
    for key in keys:
        *sections, last = key.split(".")
        section = record
        for part in sections:
            section = section[part]
        del section[last]
    path.write_text(json.dumps(record))


DEFAULTS = ("optimizer.muon.nesterov", "stage.clip", "stage.p_std", "data.text_dtype")


def test_what_a_record_lacks_had_its_default(data: dict[str, Any], run: Path) -> None:
    """Each stage was begun by another version than the stage before."""
    forget(run, "masked", *DEFAULTS, "precision", "edm.sigma_max")
    plan = plan_of(data, run)
    run_folder.check(plan)
    trainer.run(plan)  # the third stage is begun now
    forget(run, "masked", "optimizer.eps")
    run_folder.check(plan)


@pytest.mark.parametrize("key", ["optimizer.expert_lr", "data.text", "stage.mask", "seed"])
def test_what_is_not_at_its_default_counts(data: dict[str, Any], run: Path, key: str) -> None:
    forget(run, "masked", key)
    with pytest.raises(SettingError, match=rf"with other settings \({key}: None -> "):
        run_folder.check(plan_of(data, run))


def version(section: type[Any], **fields: Any) -> type[Any]:
    return create_model(section.__name__, __base__=section, **fields)


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optional settings that do not exist yet, in each kind of section."""
    stage = version(stage_settings.StageSettings, news=(float, 0.5), more=(str | None, None))
    muon = version(settings.Muon, news=(int, 5))
    optimizer = version(settings.Optimizer, muon=(muon | None, None), news=(list[int], [1, 2]))
    edm = version(settings.Edm, news=(float, 1.0))
    own = version(settings.Data, news=(str, "all"), nested=(edm, edm()))
    whole = version(
        settings.Config,
        optimizer=(optimizer, optimizer()),
        edm=(edm | None, None),
        data=(own, ...),
        stages=(dict[str, stage], ...),
    )
    monkeypatch.setattr(load, "Config", whole)
    monkeypatch.setattr(load, "StageSettings", stage)


NEWS = ("stages.full.news", "optimizer.news", "optimizer.muon.news", "edm.news", "data.news")


@pytest.mark.usefixtures("next_version")
@pytest.mark.parametrize("key", ["", *NEWS])
def test_a_setting_that_does_not_exist_yet(data: dict[str, Any], run: Path, key: str) -> None:
    """Unset, or set to its default, it changes nothing; set to something else it does."""
    defaults: dict[str, Any] = dict(zip(NEWS, (0.5, [1, 2], 5, 1.0, "all"), strict=True))
    others: dict[str, Any] = dict(zip(NEWS, (0.75, [1, 3], 6, 2.0, "some"), strict=True))
    run_folder.check(plan_of(changed(data, key, defaults[key]) if key else data, run))
    if key:
        with pytest.raises(SettingError, match=r"with other settings \(.*news: None -> "):
            run_folder.check(plan_of(changed(data, key, others[key]), run))


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.norm_eps", 1e-6), ("model.qkv_multipliers", [0.5, 1.0]), ("stages.full.p_std", 1.2)],
)
def test_a_default_may_be_stated(
    data: dict[str, Any], run: Path, key: str, value: Any, tmp_path: Path
) -> None:
    path, stated = tmp_path / "run.yaml", changed(data, key, value)
    path.write_text(json.dumps({**stated, "folder": str(run)}))
    assert main([str(path)]) == 0
    path.write_text(json.dumps({**data, "folder": str(run)}))
    assert main([str(path)]) == 0  # and left out again


def test_a_size_that_differs(data: dict[str, Any], run: Path) -> None:
    with pytest.raises(SettingError, match=r"\(model.mixer_depth: 1 -> 2\)"):
        run_folder.check(plan_of(changed(data, "model.mixer_depth", 2), run))
    with pytest.raises(SettingError, match=r"\(model.moe_every: None -> 4\)"):
        run_folder.check(plan_of(changed(data, "model.moe_every", 4), run))

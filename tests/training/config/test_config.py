"""Settings: what a YAML may say, how it is completed, and what a mistake is answered with."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import SettingError
from tests.checkout import ROOT
from tests.training.helpers.groups import Encoders, changed, make_source
from training.checkpoint import run_folder
from training.config.load import _keys, load, resolve
from training.config.plan import MissingData
from training.config.settings import Config, Model
from training.config.stage_settings import NOISE
from training.masking.ratio import ratio_at
from training.masking.tread import Tread
from training.run.preflight import check

TUNING = sorted(ROOT.glob("yamls/tune*.yaml"))

# Those that start from weights: tests/training/config/test_init_from.py.
RUNS = sorted({*ROOT.glob("yamls/*.yaml"), *ROOT.glob("yamls/ablations/*.yaml")} - set(TUNING))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_shipped_settings_can_be_planned(path: Path) -> None:
    from training.run.cost import report

    plan = check(load([str(path), "data.root=/nowhere"]), need_data=False)
    assert plan.config.name == path.stem
    assert "GPU-hours, $" in report(plan)


@pytest.mark.parametrize("source", load([str(ROOT / "yamls/1b.yaml")]).data.sources)
def test_the_papers_sources_are_encoded_as_the_paper_is_trained(source: str) -> None:
    """`pipeline run encode --source …` without options makes what yamls/1b.yaml streams."""
    from pipeline.config import load_config

    config = load([str(ROOT / "yamls/1b.yaml")])
    encode = load_config(source, ROOT / f"yamls/data/{source}.yaml", {}).encode
    data = config.data
    assert (encode.vae, encode.text_encoder) == (data.vae, data.text_encoder)
    assert (encode.text, encode.text_dtype) == (data.text, data.text_dtype)
    assert (encode.captions, encode.latents, encode.crop) == ("alt", data.latents, data.crop)
    assert {stage.resolution for stage in config.stages.values()} <= set(encode.resolutions)


def test_the_paper_in_one_file() -> None:
    """Steps, rates, noise and clipping of the four stages (facts/method.md, section 3.1)."""
    stages = load([str(ROOT / "yamls/1b.yaml")]).stages
    assert list(stages) == ["256-masked", "256-full", "512-masked", "512-full"]
    assert [s.steps for s in stages.values()] == [250_000, 30_000, 50_000, 5_000]
    assert [s.lr for s in stages.values()] == [2.4e-4, 8e-5, 8e-5, 8e-5]
    assert [s.mask_ratio for s in stages.values()] == [0.75, 0, 0.75, 0]
    assert [(s.p_mean, s.p_std) for s in stages.values()] == [(-0.6, 1.2)] * 2 + [(0, 0.6)] * 2
    assert [s.clip for s in stages.values()] == [0.25, 0.25, 0.5, 0.5]
    assert [s.microbatch for s in stages.values()] == [256, 64, 32, 16]
    assert [s.ema for s in stages.values()] == [None, None, 0.99975, 0.9975]
    assert {s.batch_size for s in stages.values()} == {2048}


def test_stage_states_only_what_differs(raw: dict[str, Any]) -> None:
    config = resolve(raw)
    assert list(config.stages) == ["masked", "full"]
    assert config.stages["masked"].lr == config.stages["full"].lr == 1e-2
    assert (config.stages["masked"].schedule, config.stages["full"].schedule) == (
        "constant",
        "cosine",
    )
    other = resolve(changed(changed(raw, "defaults.lr", 3e-4), "stages.full.lr", 1e-5))
    assert (other.stages["masked"].lr, other.stages["full"].lr) == (3e-4, 1e-5)


def test_arguments_override_the_file(raw: dict[str, Any], tmp_path: Path) -> None:
    raw = changed(raw, "stages.512-masked", {"steps": 5, "resolution": 128})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    config = load([str(path), "stages.512-masked.lr=1e-4", "seed=0", "data.sources=[a,b]"])
    assert config.stages["512-masked"].lr == 1e-4
    assert config.seed == 0
    assert config.data.sources == ["a", "b"]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_file_states_what_differs_from_its_base(raw: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "run.yaml", yaml.safe_dump(raw, sort_keys=False))
    middle = "base: ../run.yaml\nname: middle\nseed: 5\nstages: {full: {lr: 0.5, clip: null}}"
    write(tmp_path / "a/middle.yaml", middle)
    top = "base: middle.yaml\nseed: 6\nmodel: {qkv_multipliers: [1, 1]}\ndata: {sources: {a: 1}}"
    top += "\nstages: {more: {steps: '${stages.full.steps}'}}"
    config = load([write(tmp_path / "a/top.yaml", top), "stages.more.lr=0.25"])
    assert (config.name, config.seed) == ("middle", 6)
    assert list(config.stages) == ["masked", "full", "more"]
    assert [stage.lr for stage in config.stages.values()] == [1e-2, 0.5, 0.25]
    assert config.stages["more"].steps == config.stages["full"].steps == 7
    assert config.stages["full"].clip is None
    assert config.model.qkv_multipliers == (1, 1)
    assert config.model.width == raw["model"]["width"]
    assert config.data.sources == {"a": 1}  # a mapping in the place of a list
    same = load([str(tmp_path / "run.yaml"), "stages.full.lr=0.5", "stages.full.clip=null"])
    assert config.stages["full"] == same.stages["full"]


def test_a_stage_of_the_base_that_is_null_is_taken_away(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["stages"]["full"].pop("keep_moments", None)
    write(tmp_path / "run.yaml", yaml.safe_dump(raw, sort_keys=False))
    middle = write(tmp_path / "middle.yaml", "base: run.yaml\nstages: {masked: null}")
    assert list(load([middle]).stages) == ["full"]
    assert list(load([str(tmp_path / "run.yaml"), "stages.masked=null"]).stages) == ["full"]
    top = "base: middle.yaml\nstages: {masked: {steps: 3, batch_size: 4, lr: 0.1}, full: null}"
    assert list(load([write(tmp_path / "top.yaml", top)]).stages) == ["masked"]
    nothing = write(tmp_path / "none.yaml", "base: middle.yaml\nstages: {full: null}")
    with pytest.raises(SettingError, match="stages: missing"):
        load([nothing])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"run.yaml": "base: ../rum.yaml", "../run.yaml": ""},
            r"a/run\.yaml -> .*rum\.yaml: No such file or directory; did you mean \"run\.yaml\"",
        ),
        ({"run.yaml": "base: run.yaml"}, r"base: .*run\.yaml: a file cannot be its own base"),
        (
            {"run.yaml": "base: b/x.yaml", "b/x.yaml": "base: ../run.yaml"},
            r"base: .*a/run\.yaml -> .*b/x\.yaml -> .*run\.yaml: a file cannot be its own base",
        ),
        ({"run.yaml": "base: [x.yaml]"}, r"base=\['x\.yaml'\]: give one YAML file"),
        ({"run.yaml": "base: x.yaml", "x.yaml": "- 1"}, r"x\.yaml: expected a mapping"),
        ({"run.yaml": "base: x.yaml", "x.yaml": "name: ["}, r"x\.yaml: not YAML"),
    ],
)
def test_unusable_bases(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        write(tmp_path / "a" / name, text)
    with pytest.raises(SettingError, match=message) as error:
        load([str(tmp_path / "a/run.yaml")])
    assert len(str(error.value).splitlines()) == 1


def test_pairs_of_ablations_cost_the_same() -> None:
    """Two ablations of the paper compare networks at equal FLOPs."""
    from training.config.plan import network_config
    from training.run.cost import forward_flops

    def cost(name: str) -> float:
        plan = check(load([str(ROOT / f"yamls/{name}.yaml"), "data.root=/nowhere"]), False)
        stage = plan.config.stages["256-masked"]
        return forward_flops(network_config(plan, stage), stage, 77)

    wide, scaled = cost("ablations/constant-width"), cost("ablations/layerwise")
    assert wide == pytest.approx(scaled, rel=0.02)
    assert cost("ablations/smaller-unmasked") == pytest.approx(cost("tiny"), rel=0.02)
    # A schedule costs the mean over its steps: all between the two ends, in equal shares.
    assert cost("tiny") < cost("ablations/mask-schedule") < cost("ablations/no-mask")


def test_mask_settings(raw: dict[str, Any]) -> None:
    ramp = {"from": 0.5, "to": 0.0, "steps": 10, "levels": 2}
    stage = resolve(changed(raw, "stages.masked.mask_ratio", ramp)).stages["masked"]
    assert [ratio_at(stage.mask_ratio, step) for step in (0, 4, 5, 9)] == [0.5, 0.5, 0.0, 0.0]
    assert stage.model_dump(mode="json")["mask_ratio"] == ramp | {"shape": "linear"}
    tread = {"mask": "tread", "tread_blocks": [0, 1]}
    stage = resolve(changed(raw, "stages.masked", raw["stages"]["masked"] | tread)).stages["masked"]
    assert stage.scheme() == Tread(tread_blocks=(0, 1))


def test_a_stage_begun_before_a_setting_existed_goes_on(
    raw: dict[str, Any], encoders: Encoders
) -> None:
    make_source(Path(raw["data"]["root"]), encoders)
    plan = check(resolve(raw))
    run_folder.begin(plan, "masked")
    path = run_folder.stage_folder(plan, "masked").settings
    settings = json.loads(path.read_text())
    del settings["stage"]["mask_block"], settings["stage"]["tread_blocks"]
    path.write_text(json.dumps(settings))
    run_folder.check(plan)
    used = changed(changed(raw, "stages.masked.mask", "block"), "stages.masked.mask_block", 2)
    with pytest.raises(SettingError, match=r"stage\.mask_block: None -> 2"):
        run_folder.check(check(resolve(used)))
    ramp = {"from": 0.5, "to": 0.0, "steps": 10}
    with pytest.raises(SettingError, match=r"stage\.mask_ratio: 0\.5 -> \{'from': 0\.5, 'to'"):
        run_folder.check(check(resolve(changed(raw, "stages.masked.mask_ratio", ramp))))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", 1e-3, 'lr: unknown key; did you mean "defaults.lr"?'),
        ("data.vea", "sdxl", 'data.vea: unknown key; did you mean "vae"?'),
        ("optimiser.eps", 1, 'optimiser: unknown key; did you mean "optimizer"?'),
        ("defaults.p_meen", 0.0, 'defaults.p_meen: unknown key; did you mean "p_mean"?'),
        ("data.cache_limit", "5 apples", "data.cache_limit: give a size in bytes, e.g. 500GB"),
        ("stages.full.stepps", 3, 'stages.full.stepps: unknown key; did you mean "steps"?'),
        ("stages.full.steps", "many", "stages.full.steps='many': input should be a valid integer"),
        ("stages.full.steps", True, "stages.full.steps=True: input should be a valid integer"),
        ("stages.full.steps", 2.5, "stages.full.steps=2.5: input should be a valid integer"),
        ("defaults.lr", "1e-3", "defaults.lr='1e-3': input should be a valid number"),
        ("defaults.lr", float("inf"), "defaults.lr=inf: input should be a finite number"),
        ("stages.full.p_mean", float("nan"), "p_mean=nan: input should be a finite number"),
        ("defaults.lr", 0, "defaults.lr=0: input should be greater than 0"),
        ("stages.full.mask_ratio", 1.0, "stages.full.mask_ratio=1.0: input should be less than 1"),
        ("stages.full.mask_ratio", 0.5, "stages.full: mask_ratio 0.5 with mask none: name a mask"),
        ("stages.full.mask", "defered", 'stages.full: mask defered: unknown; did you mean "defe'),
        ("stages.full.mask_ratio", "0.5", "stages.full.mask_ratio='0.5': input should be a valid"),
        (
            "stages.full.mask_ratio",
            {"from": 0.5, "to": 0.0, "steps": 5, "levels": 2},
            "stages.full: mask_ratio with mask none: name a mask, deferred",
        ),
        (
            "stages.masked.mask_ratio",
            {"from": 0.5, "to": 0.0, "steps": 11},
            "stages.masked: mask_ratio.steps 11: beyond the stage's 10 steps",
        ),
        (
            "stages.masked.mask_ratio",
            {"from": 1.0, "to": 0.0, "steps": 10},
            "stages.masked.mask_ratio.from=1.0: input should be less than 1",
        ),
        (
            "stages.masked.mask_ratio",
            {"from": 0.5, "to": 0.5, "steps": 10},
            "stages.masked.mask_ratio: from 0.5 to 0.5: give the number alone",
        ),
        (
            "stages.masked.mask_ratio",
            {"from": 0.5, "to": 0.0, "steps": 4},
            "stages.masked.mask_ratio: levels 8: at most one a step, steps is 4",
        ),
        (
            "stages.masked.mask_ratio",
            {"form": 0.5, "from": 0.5, "to": 0.0, "steps": 10},
            'stages.masked.mask_ratio.form: unknown key; did you mean "from"?',
        ),
        ("stages.masked.mask", "block", "stages.masked: mask block without mask_block: give one"),
        ("stages.masked.mask_block", 3, "stages.masked.mask_block=3: input should be 2, 4 or 8"),
        ("stages.masked.mask_block", 4, "stages.masked: mask_block 4 with mask deferred, which"),
        ("stages.masked.mask", "tread", "stages.masked: mask tread without tread_blocks: give one"),
        ("model.feed_forward", "swigl", 'did you mean "swiglu"?'),
        ("base", "x.yaml", "base: unknown key"),
        ("3", 4, "3: unknown key"),
        ("stages.full.warmup", 7, "stages.full: warmup 7: must be shorter than steps 7"),
        (
            "precision",
            "amp_bf",
            "precision='amp_bf': input should be 'auto', 'fp64', 'fp32'",
        ),
        ("model.arch", "MicroDiT_XL", 'did you mean "MicroDiT_XL_2"?'),
        ("model.qkv_multipliers", [0.5], "model.qkv_multipliers.1: missing"),
        ("stages.full", 3, "stages.full=3: must be a mapping"),
        ("stages", None, "stages: missing; name at least one"),
        ("stages", {"a/b": {"steps": 1}}, "stages.a/b="),
        ("data.sources", [], "data.sources=[]: list should have at least 1 item"),
        ("data.sources", {}, "data.sources={}: dictionary should have at least 1 item"),
        ("data.sources", {"a": 0, "b": 1}, "data.sources.a=0: input should be greater than 0"),
        ("stages.full.sources", {"a": -1.5}, "stages.full.sources.a=-1.5: input should be greater"),
        ("data.sources", {"a": "2"}, "data.sources.a='2': input should be a valid number"),
        ("data.sources", ["a", "b", "a"], "data.sources: a is named twice; give sources weights"),
        ("data.sources", "toy", "data.sources='toy': input should be a valid list"),
        ("data.captions", 3, "data.captions=3: input should be a valid string"),
        ("data.captions", {"a": None}, "data.captions.a=null: needs a value"),
        ("stages.masked.ema_start", 11, "stages.masked: ema_start 11: beyond the stage's"),
        ("stages.masked.final_lr", 0.5, "stages.masked: final_lr 0.5 with schedule constant"),
        ("stages.masked.keep_moments", True, "stages.masked.keep_moments: no stage before"),
        ("stage", "ful", "stage ful: no such stage"),
        (
            "data.latents",
            "moment",
            "data.latents='moment': input should be 'mean', 'sample'",
        ),
        ("data.crop", "none", "data.crop='none': input should be 'center' or 'random'"),
        (
            "objective",
            "flwo",
            "objective='flwo': input should be 'edm' or 'flow'; did you mean \"flow",
        ),
        ("objective", ["edm"], "objective=['edm']: input should be 'edm' or 'flow'"),
        (
            "stages.full.shift",
            2.0,
            "stages.full.shift: not read by objective edm, which reads p_mean",
        ),
        (
            "stages.full.p_mean",
            None,
            "stages.full.p_mean: objective edm needs a number; its default is -0.6",
        ),
        ("stages.full.ema", 1.0, "stages.full.ema=1.0: input should be less than 1"),
        ("stages.full.ema", "0.9", "stages.full.ema='0.9': input should be a valid number"),
        ("stages.full.ema", [], "stages.full.ema=[]: list should have at least 1 item"),
        ("stages.full.ema", [0.9, 0.9], "stages.full: ema 0.9: one of them is there twice"),
        (
            "stages.full.ema",
            {"power": 0.5},
            "stages.full.ema.power=0.5: input should be less than 0.28",
        ),
        (
            "optimizer.muon.momentum",
            1.0,
            "optimizer.muon.momentum=1.0: input should be less than 1",
        ),
        (
            "optimizer.muon.nestrov",
            True,
            'optimizer.muon.nestrov: unknown key; did you mean "nesterov"?',
        ),
        ("optimizer.expert_lr", 0, "optimizer.expert_lr=0: input should be greater than 0"),
        (
            "optimizer.momentum",
            0.9,
            'optimizer.momentum: unknown key; did you mean "optimizer.muon.momentum"?',
        ),
        ("fidelity", "paper", "fidelity='paper': input should be 'intended' or 'released'"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(
    raw: dict[str, Any], key: str, value: Any, message: str
) -> None:
    with pytest.raises(SettingError) as error:
        resolve(changed(raw, key, value))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_key_in_a_list_is_told_too(raw: dict[str, Any]) -> None:
    with pytest.raises(SettingError) as error:
        resolve(changed(raw, "stages.full.ema", [0.9, {"powr": 0.1}]))
    assert str(error.value).splitlines() == [
        "stages.full.ema.1.power: missing; give it a value (there or in defaults)",
        'stages.full.ema.1.powr: unknown key; did you mean "power"?',
    ]


def test_each_objective_has_its_own_settings(raw: dict[str, Any]) -> None:
    edm = resolve(raw)
    assert edm.objective_settings(edm.stages["full"]) == {
        "sigma_data": 0.9,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "p_mean": -0.6,
        "p_std": 1.2,
    }
    raw = changed(changed(raw, "objective", "flow"), "defaults.shift", 2)
    flow = resolve(changed(raw, "stages.full.logit_mean", 0.5))
    settings = [flow.objective_settings(stage) for stage in flow.stages.values()]
    assert settings[0] == {"logit_mean": 0.0, "logit_std": 1.0, "shift": 2.0}
    assert settings[1] == {"logit_mean": 0.5, "logit_std": 1.0, "shift": 2.0}
    for key in ("stages.full.p_std", "defaults.p_mean"):
        with pytest.raises(
            SettingError, match=r"p_\w+: not read by objective flow, which reads logit"
        ):
            resolve(changed(raw, key, 1.0))
    with pytest.raises(
        SettingError, match=r"^edm: not read by objective flow; remove the section$"
    ):
        resolve(changed(raw, "edm.sigma_data", 0.5))


@pytest.mark.parametrize("objective", ["edm", "flow"])
def test_every_field_of_an_objective_is_a_setting(raw: dict[str, Any], objective: str) -> None:
    """Names and defaults cannot drift apart."""
    from pkgutil import resolve_name

    from training.objectives import OBJECTIVES

    kind = resolve_name(OBJECTIVES[objective])
    config = resolve(changed(raw, "objective", objective))
    assert kind(**config.objective_settings(config.stages["full"])) == kind()
    assert config.objective_settings(config.stages["full"]).keys() == {f.name for f in fields(kind)}
    assert OBJECTIVES.keys() == NOISE.keys()
    assert kind.name == objective


def test_averages_by_name(raw: dict[str, Any]) -> None:
    def names(ema: Any) -> list[str]:
        return list(resolve(changed(raw, "stages.full.ema", ema)).stages["full"].averages())

    assert names(0.99975) == ["0.99975"]
    assert names({"power": 0.1}) == ["power-0.1"]
    assert names([0.9, {"power": 0.05}, 0.999]) == ["0.9", "power-0.05", "0.999"]
    assert names(None) == []


def test_the_papers_two_readings(raw: dict[str, Any]) -> None:
    """The published code applies neither the average nor the experts' rate that its YAML names."""
    path = str(ROOT / "yamls/1b.yaml")
    intended, released = load([path]), load([path, "fidelity=released"])
    assert intended.optimizer.expert_lr == 0.5
    assert [list(s.averages()) for s in intended.stages.values()] == [
        [],
        [],
        ["0.99975"],
        ["0.9975"],
    ]
    assert released.optimizer.expert_lr == 1.0
    assert [(s.ema, s.ema_start) for s in released.stages.values()] == [(None, 0)] * 4
    # Nothing else differs.
    same = {"fidelity": "intended", "optimizer": intended.optimizer, "stages": intended.stages}
    assert released.model_copy(update=same) == intended
    for name, stage in released.stages.items():
        averages = {key: getattr(intended.stages[name], key) for key in ("ema", "ema_start")}
        assert stage.model_copy(update=averages) == intended.stages[name]
    # A resolved config says the same once more, and what is said of either is overruled.
    assert Config.model_validate(released.model_dump(mode="json")) == released
    assert (
        resolve(
            changed(changed(raw, "optimizer.expert_lr", 0.1), "fidelity", "released")
        ).optimizer.expert_lr
        == 1
    )


def test_the_demo_keeps_its_measured_recipe() -> None:
    assert load([str(ROOT / "yamls/demo.yaml")]).optimizer.expert_lr == 1.0


def test_muon_from_an_argument(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    assert load([str(path)]).optimizer.muon is None
    muon = load([str(path), "optimizer.muon={}"]).optimizer.muon
    assert muon is not None
    assert (muon.lr, muon.momentum, muon.scale) == (1.0, 0.95, "rms")
    assert load([str(path), "optimizer.muon.scale=spectral"]).optimizer.muon != muon


def test_every_setting_is_in_the_docs() -> None:
    text = (ROOT / "docs/train.md").read_text()
    words = set(re.findall(r"\w+", text))
    assert not {key[-1] for key in _keys() if key[-1] != "*"} - words


def test_weights_from_a_file_and_from_arguments(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(changed(raw, "data.sources", {"a": 1, "b": 2.5}), sort_keys=False)
    )
    config = load([str(path), "data.sources.b=4", "stages.full.sources={c: 1, a: 3}"])
    assert config.sources_of(config.stages["masked"]) == {"a": 1, "b": 4}
    assert config.sources_of(config.stages["full"]) == {"c": 1, "a": 3}


def test_a_source_with_a_weight_but_no_shards(raw: dict[str, Any], encoders: Encoders) -> None:
    make_source(Path(raw["data"]["root"]), encoders)
    with pytest.raises(MissingData, match=r"no shards at .*run `pipeline run encode --source tyo "):
        check(resolve(changed(raw, "data.sources", {"toy": 1, "tyo": 2})))


def test_missing_settings_are_all_named(raw: dict[str, Any]) -> None:
    del raw["defaults"]["lr"], raw["data"]["vae"]
    with pytest.raises(SettingError) as error:
        resolve(raw)
    assert str(error.value).splitlines() == [
        "data.vae: missing; give it a value",
        "stages.masked.lr: missing; give it a value (there or in defaults)",
        "stages.full.lr: missing; give it a value (there or in defaults)",
    ]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("name: [", [], "not YAML"),
        ("- 1", [], "expected a mapping of settings, found a list"),
        ("name: ${nothing}\nstages: {a: {}}", [], "nothing"),
        ("stages: {masked: {steps: 1}}", ["stages.maskd.lr=1"], 'did you mean "masked"?'),
        ("name: x", ["other.yaml"], "give one YAML file"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str, arguments: list[str], message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SettingError) as error:
        load([str(path), *arguments])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("stages: {on: {steps: 0100}}", [], ""),
        ("stages: {0100: {steps: 100}}", [], ""),
        ("stages: {x: {steps: 1_000}}", [], "stages.x.steps='1_000': input should be a valid int"),
        ("stages: {x: {steps: 100}}\n'': 3", [], "'': unknown key"),
        ("stages: {x: {steps: 100}}\n'[a]': 3", [], "[a]: unknown key"),
        ("stages: {x: {steps: 100, '[a]': 3}}", [], "stages.x.[a]: unknown key"),
        ("stages: {x: {steps: 100}}", ["=3"], "=3: write dotted.key=value"),
        ("stages: {x: {steps: 100}}", ["compile=yes"], "compile='yes': input should be a valid b"),
        ("stages: {x: {steps: 100}}\nstages: {}", [], "key stages is there twice"),
        ("stages: {x: {steps: 100}}\ncompile: yes", [], "compile='yes': input should be a valid b"),
        ("3", [], "run.yaml: expected a mapping of settings, found 3"),
    ],
)
def test_yaml_is_read_as_version_1_2(
    raw: dict[str, Any], tmp_path: Path, text: str, arguments: list[str], message: str
) -> None:
    path = tmp_path / "run.yaml"
    raw = {key: value for key, value in raw.items() if key != "stages"}
    path.write_text(_flow(raw, text))
    if message:
        with pytest.raises(SettingError, match=re.escape(message)):
            load([str(path), *arguments])
        return
    stages = load([str(path), *arguments]).stages
    assert [stage.steps for stage in stages.values()] == [100]


def _flow(raw: dict[str, Any], text: str) -> str:
    """As a YAML file: each of the settings on a line."""
    if text == "3":
        return text
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in raw.items()) + text


def test_missing_file_names_the_nearest() -> None:
    with pytest.raises(SettingError, match=r'demmo.yaml: No such file .*"demo.yaml"'):
        load([str(ROOT / "yamls/demmo.yaml")])


def test_sizes_of_the_network_are_the_networks_own() -> None:
    """Every size of DiTConfig is a setting or follows from the encoders; names cannot drift."""
    from training.network.config import MODELS, DiTConfig

    derived = {"input_size", "in_channels", "caption_width", "caption_length", "pos_interp_scale"}
    ours = Model.model_fields.keys() - {"arch", "base_resolution"}
    assert ours == {field.name for field in fields(DiTConfig)} - derived
    for arch in MODELS:
        Model(arch=arch)  # pyright: ignore


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("evaluate.every", "0 turns it off"),
        ("samples.every", "0 turns it off"),
        ("stages.masked.warmup", "0 turns it off"),
        ("defaults.warmup", "0 turns it off"),
        ("data.caption_drop", "0 turns it off"),
        ("data.workers", "0 reads in the trainer"),
        ("seed", "needs a number, any one"),
        ("samples.guidance", "needs a value; leave it out for the default, 5.0"),
        ("checkpoint.remote", 'needs a value; write "" for none'),
        ("stages.masked.steps", "needs a value"),
        ("data", "needs a value"),
    ],
)
def test_null_is_answered_with_what_to_write(raw: dict[str, Any], key: str, instead: str) -> None:
    with pytest.raises(SettingError) as error:
        resolve(changed(raw, key, None))
    assert str(error.value) == f"{key}=null: {instead}"


def test_every_path_setting_knows_homes(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    # init_from, whose file is read at once: tests/training/config/test_init_from.py.
    for key in ("data.root", "data.cache", "folder", "checkpoint.remote", "data.vae"):
        raw = changed(raw, key, f"~/{key}")
    config = resolve(raw)
    assert config.data.root == "/home/me/data.root"
    assert config.data.cache == "/home/me/data.cache"
    assert config.data.vae == "/home/me/data.vae"
    assert config.run_folder() == Path("/home/me/folder")
    assert config.checkpoint.remote == "/home/me/checkpoint.remote"
    monkeypatch.setenv("MICRODIT_ROOT", "~/big")
    del raw["data"]["root"]
    assert resolve(raw).data.root == "/home/me/big"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_settings_in_any_encoding_of_the_standard(
    tmp_path: Path, raw: dict[str, Any], encoding: str
) -> None:
    text = json.dumps(changed(raw, "samples.prompts", ["für mich"]), ensure_ascii=False)
    (tmp_path / "run.yaml").write_text(text, encoding=encoding)
    assert load([str(tmp_path / "run.yaml")]).samples.prompts == ["für mich"]


def test_settings_in_latin_1_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"name: x\n# f\xfcr mich\n")
    with pytest.raises(SettingError, match=r"run\.yaml: line 2 is not UTF-8"):
        load([str(tmp_path / "run.yaml")])

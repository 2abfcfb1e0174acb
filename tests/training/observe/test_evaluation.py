"""The loss on held-out pictures: the right number, of the right pictures, and nothing disturbed."""

from __future__ import annotations

import math
import random
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback
from torch import nn

from pipeline.core import drops
from pipeline.core.errors import SettingError
from pipeline.core.latents import to_model
from tests.training.helpers.groups import Encoders, make_encoders, make_source, settings
from tests.training.helpers.runs import Watch, equal, make_toy, plan_of
from training.config.load import resolve
from training.config.plan import TrainingPlan
from training.data import heldout
from training.model import DiffusionModel
from training.objectives.edm import EDM
from training.observe import metrics_log
from training.observe.evaluation import Evaluation, names, quantiles
from training.optim.ema import swap_weights
from training.randomness import keyed_seed
from training.run import trainer
from training.run.preflight import check
from training.weights import weights_file

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One stage of 4 steps; 20 held-out pictures."""
    raw = make_toy(tmp_path_factory.mktemp("evaluation"))
    stage = {"steps": 4, "mask": "deferred", "mask_ratio": 0.5, "microbatch": 4}
    return {**raw, "stages": {"masked": stage}, "evaluate": {"every": 2, "samples": 18}}


def test_training_does_not_notice(toy: dict[str, Any], tmp_path: Path) -> None:
    runs = {}
    for every in (0, 1):
        watch, path = Watch(), tmp_path / str(every)
        trainer.run(plan_of(toy, path, evaluate={"every": every}), [watch])
        runs[every] = watch
    assert runs[0].losses == runs[1].losses
    for name in ("model", "live"):
        path = f"masked/{name}.safetensors"
        assert equal(tmp_path / "0" / path, tmp_path / "1" / path)
    counts = [
        sum(
            "eval/live/mean" in row
            for row in metrics_log.read(tmp_path / f"{n}/masked/metrics.jsonl")
        )
        for n in (0, 1)
    ]
    assert counts == [0, 4]


def test_no_generator_moves_and_no_mode_flips(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composer flips eval() and train() around each micro-batch where a model has train metrics."""
    flips, moved = [], []
    train, look = DiffusionModel.train, Evaluation.batch_end

    def switched(model: DiffusionModel, mode: bool = True) -> Any:
        flips.append(mode)
        return train(model, mode)

    def watched(self: Evaluation, state: Any, logger: Any) -> None:
        def states() -> list[Any]:
            numpy: Any = np.random.get_state()
            return [torch.get_rng_state().tolist(), random.getstate(), *map(str, numpy)]

        before = states()
        look(self, state, logger)
        moved.append(states() != before)

    monkeypatch.setattr(DiffusionModel, "train", switched)
    monkeypatch.setattr(Evaluation, "batch_end", watched)
    trainer.run(plan_of(toy, tmp_path / "run"))
    assert moved == [False] * 4
    assert flips == [True]  # once, when the fit begins


def test_losses_of_live_weights_and_average(toy: dict[str, Any], tmp_path: Path) -> None:
    """Against a direct computation from the files that a run leaves."""
    plan = plan_of(toy, tmp_path / "run", evaluate={"every": 3, "samples": 18, "bins": 4})
    trainer.run(plan)
    folder = tmp_path / "run/masked"
    rows = metrics_log.read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/live/mean" in row] == [3, 4]
    pictures = heldout.read(plan, "masked", "heldout", 18)
    assert [p.key for p in pictures] == [f"00002{n:04d}" for n in range(18)]
    edm = weights_file.read_metadata(folder / "model.safetensors").noise()
    assert isinstance(edm, EDM)
    for name, file in (("live", "live.safetensors"), ("ema", "model.safetensors")):
        network, _ = weights_file.load(folder / file)
        means = []
        for q, bin in zip((0.125, 0.375, 0.625, 0.875), ("q12", "q38", "q62", "q88"), strict=True):
            sigma = math.exp(edm.p_mean + edm.p_std * NormalDist().inv_cdf(q))
            losses = []
            for picture in pictures:
                seed = keyed_seed(plan.config.seed, "evaluate", "toy", picture.key)
                eps = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))
                x = torch.from_numpy(to_model(picture.latent.astype(np.float32), plan.vae))
                y = torch.from_numpy(picture.caption.tokens.copy()).float()
                denoised = edm.denoise(
                    network, (x + sigma * eps)[None], torch.tensor([sigma]), y=y[None]
                )
                weight = (sigma**2 + edm.sigma_data**2) / (sigma * edm.sigma_data) ** 2
                losses.append(weight * (denoised[0] - x).square().mean().item())
            means.append(sum(losses) / len(losses))
            assert rows[-1][f"eval/{name}/{bin}"] == pytest.approx(means[-1], rel=1e-5)
        assert rows[-1][f"eval/{name}/mean"] == pytest.approx(sum(means) / 4, rel=1e-5)
    assert rows[-1]["eval/live/mean"] != rows[-1]["eval/ema/mean"]
    assert rows[-1]["eval/live/mean"] != rows[2]["eval/live/mean"]


def test_bins_are_the_middles_of_equal_parts() -> None:
    assert quantiles(4) == [0.125, 0.375, 0.625, 0.875]


def test_want_of_memory_moves_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in network.named_parameters()}
    other = {name: value.detach() + 1 for name, value in network.named_parameters()}

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    for name in ("empty_like", "clone"):
        monkeypatch.setattr(torch, name, full)
    monkeypatch.setattr(torch.Tensor, "clone", full)
    with pytest.raises(torch.OutOfMemoryError), swap_weights(network, other):
        pass
    monkeypatch.undo()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(other[name], before[name] + 1)


def test_swapped_weights_are_seen_by_compiled_code() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    network.register_buffer("counter", torch.tensor(1))
    own = {name: value.detach().clone() for name, value in network.named_parameters()}
    other = {name: torch.randn_like(value) for name, value in own.items()}
    kept = {name: value.clone() for name, value in other.items()}
    compiled = torch.compile(network, backend="eager")
    x = torch.ones(1, 3)
    with torch.no_grad():
        before = compiled(x)
        with swap_weights(network, other):
            expected = torch.func.functional_call(network, kept, x)
            assert torch.equal(compiled(x), expected)
            assert all(torch.equal(other[name], own[name]) for name in own)
        assert torch.equal(compiled(x), before)
        with pytest.raises(ZeroDivisionError), swap_weights(network, other):
            _ = 1 / 0
    for name, value in network.named_parameters():
        assert torch.equal(value, own[name])
        assert torch.equal(other[name], kept[name])


def test_compiled_blocks(toy: dict[str, Any], tmp_path: Path) -> None:
    """Graphs that the first evaluation and the first sheet made serve all that follow, whatever the
    lengths of captions and the number of pictures; and numbers are those of plain code."""

    class Compile(Callback):
        def init(self, state: Any, logger: Any) -> None:
            state.model.dit.compile_blocks("eager")

    class Graphs(Callback):
        """How many graphs looking at the model made, after each step."""

        def __init__(self) -> None:
            self.made: list[int] = []

        def after_train_batch(self, state: Any, logger: Any) -> None:
            self.made.append(-torch._dynamo.utils.counters["stats"]["unique_graphs"])

        def batch_end(self, state: Any, logger: Any) -> None:
            self.made[-1] += torch._dynamo.utils.counters["stats"]["unique_graphs"]

    changes: dict[str, Any] = {"evaluate": {"every": 2, "samples": 18, "bins": 2}}
    changes["samples"] = {"every": 2, "count": 3, "steps": 2}
    graphs = Graphs()
    torch._dynamo.reset()
    trainer.run(plan_of(toy, tmp_path / "compiled", **changes), [Compile(), graphs])
    trainer.run(plan_of(toy, tmp_path / "eager", **changes))
    rows = [metrics_log.read(tmp_path / f"{n}/masked/metrics.jsonl") for n in ("compiled", "eager")]
    for key in ("train/loss", "eval/live/mean", "eval/ema/q75"):
        compiled, eager = ([row[key] for row in run if key in row] for run in rows)
        assert compiled == pytest.approx(eager, rel=1e-5)
    first, *others = (made for made in graphs.made if made)
    assert graphs.made[1] == first
    assert 0 < first <= 12  # four sizes of blocks; evaluation, and a sampler's batch of two halves
    assert others == []


def test_averages_have_names(toy: dict[str, Any], tmp_path: Path) -> None:
    stage = toy["stages"]["masked"] | {"ema": [0.9, {"power": 0.1}]}
    trainer.run(plan_of(toy, tmp_path / "run", stages={"masked": stage}))
    row = metrics_log.read(tmp_path / "run/masked/metrics.jsonl")[-1]
    names = [key.split("/")[1] for key in row if key.startswith("eval/") and key.endswith("/mean")]
    assert names == ["live", "ema", "ema-power-0.1"]
    assert len({row[f"eval/{name}/mean"] for name in names}) == 3


def test_flow(toy: dict[str, Any], tmp_path: Path) -> None:
    """The same bins are quantiles of any objective's levels: at t near 1 nothing is left but the
    mean to predict, at t near 0 noise."""
    plan = plan_of({**toy, "objective": "flow"}, tmp_path / "run")
    trainer.run(plan)
    row = metrics_log.read(tmp_path / "run/masked/metrics.jsonl")[-1]
    assert all(0 < row[f"eval/live/q{q:02}"] < 10 for q in (6, 44, 94))


def test_no_held_out_shards(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    raw = make_toy(tmp_path, splits=("train", "train"))
    stages = {"masked": {"steps": 1}}
    trainer.run(plan_of({**raw, "stages": stages}, tmp_path / "run"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "evaluation" in line]
    assert lines == ["stage masked: no shard of split heldout, so there is no evaluation"]
    assert "eval/live/mean" not in metrics_log.read(tmp_path / "run/masked/metrics.jsonl")[-1]


class TestPictures:
    """What `heldout.read` gives."""

    @pytest.fixture
    def encoders(self, tmp_path: Path) -> Encoders:
        return make_encoders(tmp_path / "encoders")

    def plan(self, tmp_path: Path, encoders: Encoders, **data: Any) -> TrainingPlan:
        raw = settings(tmp_path / "data", encoders, tmp_path / "run")
        return check(resolve({**raw, "data": raw["data"] | data}))

    def test_ranks_share_them(self, tmp_path: Path, encoders: Encoders) -> None:
        splits = ("train", "heldout", "train", "heldout")
        make_source(tmp_path / "data", encoders, splits=splits, compression="zstd")
        plan = self.plan(tmp_path, encoders)
        keys = [p.key for p in heldout.read(plan, "masked", "heldout", 30)]
        assert keys == [f"00001{n:04d}" for n in range(20)] + [f"00003{n:04d}" for n in range(10)]
        assert heldout.count(plan, "masked", "heldout", 30) == 30
        assert heldout.count(plan, "masked", "heldout", 99) == 40
        for rank in range(3):
            own = [p.key for p in heldout.read(plan, "masked", "heldout", 30, rank, 3)]
            assert own == keys[rank::3]

    def test_sources_have_their_shares(self, tmp_path: Path, encoders: Encoders) -> None:
        for name in ("toy", "more"):
            make_source(tmp_path / "data", encoders, name=name)
        plan = self.plan(tmp_path, encoders, sources={"toy": 1, "more": 3})
        names = [p.source for p in heldout.read(plan, "masked", "heldout", 8)]
        assert names == ["toy"] * 2 + ["more"] * 6

    def test_what_was_dropped_is_not_among_them(self, tmp_path: Path, encoders: Encoders) -> None:
        store = make_source(tmp_path / "data", encoders)
        drops.add(store, "toy", {"00002": ["000020000", "000020002"]})
        found = heldout.read(self.plan(tmp_path, encoders), "masked", "heldout", 3)
        assert [p.key for p in found] == ["000020001", "000020003", "000020004"]
        assert [p.latent[0, 0, 0] for p in found] == [1, 3, 4]
        assert [p.caption.text for p in found] == [f"caption {c} of 00002" for c in (1, 3, 4)]

    def test_moments_are_drawn_once_and_for_all(self, tmp_path: Path, encoders: Encoders) -> None:
        make_source(tmp_path / "data", encoders, latents="moments")
        plan = self.plan(tmp_path, encoders, latents="moments")
        first, again = (heldout.read(plan, "masked", "heldout", 4) for _ in range(2))
        for a, b in zip(first, again, strict=True):
            assert a.latent.shape == (4, 8, 8)
            assert np.array_equal(a.latent, b.latent)
        deviations = np.stack([p.latent[0, 0, 0] - n for n, p in enumerate(first)])
        assert 0 < np.abs(deviations).max() < 5 * math.exp(-1)

    def test_one_without_a_caption(self, tmp_path: Path, encoders: Encoders) -> None:
        make_source(tmp_path / "data", encoders, without_caption=("000020003",))
        plan = self.plan(tmp_path, encoders)
        with pytest.raises(SettingError, match="picture 000020003 has a latent but no caption"):
            heldout.read(plan, "masked", "heldout", 10)


def test_each_bin_has_a_name_of_its_own() -> None:
    assert names(8) == ["q06", "q19", "q31", "q44", "q56", "q69", "q81", "q94"]
    assert names(100)[:3] == ["q005", "q015", "q025"]
    assert all(len(set(names(bins))) == bins for bins in [*range(1, 300), 1000])

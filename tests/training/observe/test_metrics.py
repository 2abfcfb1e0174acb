"""What a run says: every step once, after a kill too; speed, waiting and costs that are so."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from composer import Callback
from PIL import Image

from pipeline.core.errors import SettingError
from tests.training.helpers.runs import Poison, Watch, make_toy, plan_of
from training.flops import flops_per_image
from training.observe import credentials, curve, metrics_log
from training.observe.meter import DeviceHours, Totals
from training.observe.metrics import Price, price_of
from training.observe.metrics_log import Journal
from training.run import callbacks, trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One stage of 10 steps, a checkpoint every 4."""
    raw = make_toy(tmp_path_factory.mktemp("metrics"))
    return {**raw, "stages": {"masked": raw["stages"]["masked"]}, "logging": {"every_steps": 3}}


class Stop(Callback):
    """The process goes away after a step, as far as a test in the same process can have it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def batch_end(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def resumed(
    toy: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Watch]:
    """The journal of a run that was stopped after step 7, before and after it went on from step 4,
    and what was watched in the second start."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    with pytest.raises(KeyboardInterrupt):
        trainer.run(plan_of(toy, folder), [Stop(7)])
    first = metrics_log.read(folder / "masked/metrics.jsonl")
    watch = Watch()
    trainer.run(plan_of(toy, folder), [watch])
    return first, metrics_log.read(folder / "masked/metrics.jsonl"), watch


def test_a_line_a_step_also_after_a_resume(resumed: Any) -> None:
    first, rows, watch = resumed
    assert [row["step"] for row in first] == list(range(1, 8))
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[:4] == first[:4]
    assert [row["train/loss"] for row in rows[4:]] == watch.losses["toy-masked"]
    assert [row["train/lr"] for row in rows[4:]] == watch.rates["toy-masked"]
    assert [row["train/loss"] for row in rows[4:7]] == [row["train/loss"] for row in first[4:]]


def test_figures_of_every_third_step_and_the_last(resumed: Any) -> None:
    _, rows, watch = resumed
    reports = [row for row in rows if "train/samples_per_second" in row]
    assert [row["step"] for row in reports] == [3, 6, 9, 10]
    for row in reports:
        assert 0 <= row["train/data_wait_share"] <= 1
        assert row["train/samples_per_second"] > 0
        assert row["train/tflops_per_device"] > 0
        assert "train/mfu" not in row  # of a CPU no peak is known
        assert "train/dollars" not in row
    losses = watch.losses["toy-masked"]  # the second start's first window is steps 5 and 6
    assert reports[1]["train/loss_mean"] == pytest.approx(sum(losses[:2]) / 2)
    assert reports[2]["train/loss_mean"] == pytest.approx(sum(losses[2:5]) / 3)


def test_hours_go_on_where_the_last_start_stopped(resumed: Any) -> None:
    first, rows, _ = resumed
    hours = [row["train/device_hours"] for row in rows if "train/device_hours" in row]
    assert hours == sorted(hours)
    # Steps 5 to 7 were made twice: what they took the first time is on the device_hours as well.
    spent = next(row["train/device_hours"] for row in first if row["step"] == 6)
    assert hours[1] > spent > hours[0] > 0
    assert hours[-1] < 0.1


def test_prices_where_they_are_known(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As on a GPU: dollars are hours times the price, over stages; MFU is FLOP/s by the peak."""
    price = Price(peak_flops=1e12, dollars_per_hour=3600.0)
    monkeypatch.setattr(callbacks, "price_of", lambda *_: price)
    stages = {"first": {"steps": 3}, "second": {"steps": 3}}
    trainer.run(plan_of(toy, tmp_path / "run", stages=stages))
    bills = []
    for stage in stages:
        row = metrics_log.read(tmp_path / f"run/{stage}/metrics.jsonl")[-1]
        assert row["train/dollars"] == pytest.approx(3600 * row["train/device_hours"])
        assert row["train/mfu"] == pytest.approx(row["train/tflops_per_device"])
        bills.append(row["train/dollars"])
    assert 0 < bills[0] < bills[1] < 60
    shown = [line for line in capsys.readouterr().err.splitlines() if "data wait" in line]
    assert len(shown) == 2
    assert all("MFU " in line and "  $" in line for line in shown)
    assert price_of("gpu", 989.0, 3.75) == Price(989e12, 3.75)
    assert price_of("cpu", 989.0, 3.75) == Price()


def test_flops_are_the_closed_form(toy: dict[str, Any], tmp_path: Path) -> None:
    """Of what was computed between two reports, by the seconds it took."""
    batches: list[int] = []

    class Lengths(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            batches.append(state.batch["y"].shape[1])
            self.network = state.model.dit.config

    look = Lengths()
    trainer.run(plan_of(toy, tmp_path / "run"), [look])
    row = metrics_log.read(tmp_path / "run/masked/metrics.jsonl")[2]
    expected = 8 * 3 * sum(flops_per_image(look.network, 0.5, length) for length in batches[:3])
    seconds = 3 * 8 / row["train/samples_per_second"]
    assert row["train/tflops_per_device"] * 1e12 * seconds == pytest.approx(expected)


def test_what_is_no_training_is_no_waiting(toy: dict[str, Any], tmp_path: Path) -> None:
    """A slow loader shows as waiting; evaluation, samples and saving do not count at all."""

    class SlowLoader(Callback):
        def before_dataloader(self, state: Any, logger: Any) -> None:
            time.sleep(0.25)  # a step takes 0.03 s, or 0.13 s beside other work

    trainer.run(plan_of(toy, tmp_path / "slow", evaluate={"every": 0}), [SlowLoader()])
    row = metrics_log.read(tmp_path / "slow/masked/metrics.jsonl")[-1]
    assert row["train/data_wait_share"] > 0.5
    assert row["train/stalls"] == 9  # all but the first step

    seconds = []

    class SlowEvaluation(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            meter = next(c for c in state.callbacks if type(c).__name__ == "Meter")
            seconds.append(meter.totals.seconds)
            with meter.paused():
                time.sleep(0.3)

    trainer.run(plan_of(toy, tmp_path / "aside", evaluate={"every": 0}), [SlowEvaluation()])
    assert seconds[-1] < 10 * 0.3


def test_rates() -> None:
    first = Totals(steps=1, samples=10, seconds=2.0, waited=0.5)
    last = Totals(steps=3, samples=30, flops=4e12, seconds=4.0, waited=1.0, losses=2, loss=1.0)
    window = last - first
    assert window.rates(8e12) == {
        "samples_per_second": 10,
        "tflops_per_device": 2,
        "data_wait_share": 0.25,
        "mfu": 0.25,
    }
    assert window.mean_loss() == 0.5
    assert math.isnan(Totals().mean_loss())


def test_bill() -> None:
    device_hours = DeviceHours(devices=8)
    time.sleep(0.01)
    now = device_hours.device_seconds()
    assert 0.08 <= now < 8
    device_hours.raise_to(100.0)
    device_hours.raise_to(50.0)  # the older of two records
    assert 100 <= device_hours.device_seconds() < 108


def test_journal(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert metrics_log.read(path) == []
    assert metrics_log.last(path, "a") is None
    book = Journal(path)
    book.cut(3)
    for step in range(1, 5):
        book.add(step, {"a": float(step)})
    book.add(2, {"b": math.nan, "c": math.inf, "d": 7})
    assert not path.exists()
    book.write()
    with open(path, "a") as file:
        file.write('{"step": 5, "a"')  # a kill
    assert [row["step"] for row in metrics_log.read(path)] == [1, 2, 3, 4]
    assert metrics_log.read(path)[1] == {"step": 2, "a": 2.0, "b": None, "c": None, "d": 7}
    assert metrics_log.last(path, "a") == 4
    assert metrics_log.last(path, "d") == 7
    assert metrics_log.last(path, "b") is None
    book.cut(9)
    assert path.read_text().endswith("}\n")
    book.cut(2)
    book.add(3, {"a": 33.0})
    book.write()
    assert [row["a"] for row in map(json.loads, path.read_text().splitlines())] == [1, 2, 33]


def test_curve(toy: dict[str, Any], tmp_path: Path) -> None:
    trainer.run(plan_of(toy, tmp_path / "run", evaluate={"every": 5}), [Poison([3])])
    with Image.open(tmp_path / "run/masked/loss.png") as picture:
        assert picture.size == (800, 500)
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 10
    curve.draw([{"step": 1, "train/loss": None}], "nothing to draw", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.slow
def test_weights_and_biases(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages, a W&B run each, offline; read back from what wandb wrote."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    stages = {"first": {"steps": 3}, "second": {"steps": 2}}
    plan = plan_of(toy, tmp_path / "run", stages=stages, logging={"to": ["wandb"]})
    trainer.run(plan, [Picture()])
    for stage, steps in (("first", 3), ("second", 2)):
        [folder] = (tmp_path / "run" / stage / "wandb").glob("offline-run-*")
        data = next(folder.glob("run-*.wandb")).read_bytes()
        assert b"train/loss_mean" in data
        assert b"eval/ema/mean" in data
        pictures = list((folder / "files/media/images").glob("*.png"))
        assert [picture.name.split("_")[1] for picture in pictures] == [str(steps)]
        with Image.open(pictures[0]) as picture:
            assert picture.size == (6, 4)


class Picture(Callback):
    """Logs one at the end."""

    def fit_end(self, state: Any, logger: Any) -> None:
        logger.log_images(np.zeros((4, 6, 3), np.uint8), "p", channels_last=True, use_table=False)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_logger_that_is_not_installed(toy: dict[str, Any], tmp_path: Path, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        with pytest.raises(
            SettingError, match=rf"logging\.to={name}: pip install '{name}.*' first"
        ):
            credentials.check(plan_of(toy, tmp_path, logging={"to": [name]}).config)

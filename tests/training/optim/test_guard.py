"""Bad steps: skipped, rolled back, given up; alike on all ranks and after a kill."""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback
from safetensors.torch import load_file

from pipeline.core.errors import SettingError
from tests.training.helpers.runs import (
    Poison,
    Watch,
    equal,
    last_losses,
    make_toy,
    plan_of,
    run_process,
)
from training.checkpoint.checkpoints import read
from training.checkpoint.run_folder import StageFolder
from training.config.load import resolve
from training.observe import metrics_log
from training.optim.guard import threshold
from training.randomness import stage_key
from training.run import trainer
from training.run.stopping import Terminated

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One masked stage of 10 steps with a checkpoint every 4; no evaluation."""
    raw = make_toy(tmp_path_factory.mktemp("guard"))
    return {**raw, "stages": {"masked": raw["stages"]["masked"]}, "evaluate": {"every": 0}}


def test_threshold_is_median_and_mad() -> None:
    history = deque([1.0, 2.0, 3.0, 4.0, 1000.0], maxlen=5)
    assert threshold(history, 2.0) == pytest.approx(3 + 2 * 1.4826 * 1)  # |-2|, |-1|, 0, 1, 997
    assert threshold(deque([1.0], maxlen=2), 2.0) == float("inf")


def test_keys_of_roll_backs() -> None:
    """Without one the key is as it always was."""
    assert [stage_key("full", n) for n in range(3)] == ["full", "full/1", "full/2"]


class Weights(Callback):
    """Copies of the first weight, of its average and of the optimizer's count after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def batch_end(self, state: Any, logger: Any) -> None:
        name, weight = next(iter(state.model.dit.named_parameters()))
        ema = next(c for c in state.callbacks if type(c).__name__ == "EMA")
        count = state.optimizers[0].state[weight]["step"].item()
        self.seen.append((weight.detach().clone(), ema.averages()["ema"][name].clone(), count))


def test_one_bad_step_changes_nothing(toy: dict[str, Any], tmp_path: Path, capsys) -> None:
    weights, watch = Weights(), Watch()
    trainer.run(plan_of(toy, tmp_path / "run"), [Poison([6]), weights, watch])
    for after in (4, 6):  # steps 5 and 7 are good ones
        assert not torch.equal(weights.seen[after][0], weights.seen[after - 1][0])
    for before, after in zip(weights.seen[4], weights.seen[5], strict=True):
        assert torch.equal(torch.as_tensor(before), torch.as_tensor(after))
    assert [count for _, _, count in weights.seen] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    assert all(loss == loss for loss in watch.losses["toy-masked"])
    rows = metrics_log.read(tmp_path / "run/masked/metrics.jsonl")
    assert [row["guard/skipped"] for row in rows] == [0] * 5 + [1] * 5
    assert [row["train/grad_norm"] is None for row in rows] == [n == 6 for n in range(1, 11)]
    message = "masked 6/10  the gradient norm is nan: step skipped (1 in a row, 1 of the stage)"
    assert message in capsys.readouterr().err
    assert StageFolder(tmp_path / "run/masked").rollbacks() == []


def test_no_checkpoint_of_a_bad_row(toy: dict[str, Any], tmp_path: Path) -> None:
    """Step 8 would be one: it is left out, and the one of step 4 stays until a good one comes."""
    seen: dict[int, list[str]] = {}

    class Look(Callback):
        def batch_checkpoint(self, state: Any, logger: Any) -> None:
            folder = StageFolder(tmp_path / "run/masked")
            seen[state.timestamp.batch.value] = [path.name for path in folder.checkpoints()]

    trainer.run(plan_of(toy, tmp_path / "run"), [Poison([7, 8]), Look()])
    assert seen[8] == seen[9] == ["step-00000004.pt"]
    assert seen[10] == ["step-00000010.pt"]


@pytest.mark.parametrize(("steps", "to"), [([2, 3, 4], 0), ([6, 7, 8], 4)])
def test_what_depends_on_the_data_disappears(
    toy: dict[str, Any], tmp_path: Path, steps: list[int], to: int
) -> None:
    """Batches that poison come in other company after the roll-back, and with other noise."""
    latents: dict[str, dict[int, float]] = {}

    class Batches(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            own = latents.setdefault(state.model.objective.stage, {})
            own[state.timestamp.batch.value + 1] = state.batch["latents"].sum().item()

    plain = Watch()
    trainer.run(plan_of(toy, tmp_path / "plain"), [Batches(), plain])
    bad = {latents["masked"][step] for step in steps}

    class BadData(Callback):
        def after_backward(self, state: Any, logger: Any) -> None:
            if state.batch["latents"].sum().item() in bad:
                next(iter(state.model.parameters())).grad.fill_(float("inf"))

    watch = Watch()
    latents.clear()
    trainer.run(plan_of(toy, tmp_path / "run"), [Batches(), BadData(), watch])
    folder = StageFolder(tmp_path / "run/masked")
    reason = "the gradient norm is inf, 3 bad steps in a row"
    assert folder.rollbacks() == [{"step": steps[-1], "to": to, "reason": reason}]
    assert read(folder.checkpoint(10)).rollbacks == 1
    again = latents["masked/1"]
    assert sorted(again) == list(range(to + 1, 11))
    assert all(again[step] != latents["masked"][step] for step in steps)
    rows = metrics_log.read(folder.metrics)
    assert [row["step"] for row in rows] == list(range(1, 11))
    losses = [row["train/loss"] for row in rows]
    assert losses[:to] == plain.losses["toy-masked"][:to]
    assert all(a != b for a, b in zip(losses[to:], plain.losses["toy-masked"][to:], strict=True))
    assert all(value.isfinite().all() for value in load_file(folder.model).values())


def test_what_does_not_go_away_ends_the_run(toy: dict[str, Any], tmp_path: Path, capsys) -> None:
    plan = plan_of(toy, tmp_path / "run", guard={"in_a_row": 2, "rollbacks": 2})
    with pytest.raises(SettingError, match="stage masked, step 7: the gradient norm is") as error:
        trainer.run(plan, [Poison(range(6, 11))])
    assert "as it was before 2 roll-backs to step 4" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    folder = StageFolder(tmp_path / "run/masked")
    assert len(folder.rollbacks()) == 2
    assert [path.name for path in folder.checkpoints()] == ["step-00000004.pt"]
    assert all(value.isfinite().all() for value in read(folder.checkpoint(4)).model.values())
    assert capsys.readouterr().err.count("back to step 4") == 2
    # The guard is no part of what a stage was begun with: more may be asked of it.
    trainer.run(plan_of(toy, tmp_path / "run", guard={"rollbacks": 5}), [Poison([6])])
    assert folder.finished()


@pytest.mark.parametrize(
    ("step", "stop", "reason", "last"),
    [
        (8, 8, "weights are no numbers", 4),  # a checkpoint is due after a step that was good
        (9, 10, "the loss is nan and .* and weights are no numbers", 8),  # the stage ends too soon
    ],
)
def test_weights_that_are_no_numbers_are_never_saved(
    toy: dict[str, Any], tmp_path: Path, step: int, stop: int, reason: str, last: int
) -> None:
    class Break(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch.value == step:
                next(iter(state.model.parameters())).data.fill_(float("inf"))

    plan = plan_of(toy, tmp_path / "run", guard={"rollbacks": 1})
    with pytest.raises(SettingError, match=rf"step {stop}: {reason}, as it was before 1 roll-back"):
        trainer.run(plan, [Break()])
    [checkpoint] = StageFolder(tmp_path / "run/masked").checkpoints()
    assert checkpoint.name == f"step-{last:08d}.pt"


def test_sigterm_among_bad_steps(toy: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint from before them stays the last one, so the next start does as this would."""

    class Signal(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch.value == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    poison = Poison([6, 7, 8], "masked")
    with pytest.raises(Terminated):
        trainer.run(plan_of(toy, tmp_path / "run"), [poison, Signal()])
    folder = StageFolder(tmp_path / "run/masked")
    assert [path.name for path in folder.checkpoints()] == ["step-00000004.pt"]
    for name in ("run", "whole"):
        trainer.run(plan_of(toy, tmp_path / name), [poison])
    assert len(folder.rollbacks()) == 1
    assert equal(tmp_path / "run/model.safetensors", tmp_path / "whole/model.safetensors")


@pytest.mark.parametrize("kind", ["loss_spike", "grad_spike"])
def test_spikes(toy: dict[str, Any], tmp_path: Path, kind: str, capsys) -> None:
    class Spike(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch.value == 9:
                state.batch = {**state.batch, "latents": 100 * state.batch["latents"]}

    weights = Weights()
    guard = {kind: 20.0, "window": 8}
    trainer.run(plan_of(toy, tmp_path / "run", guard=guard), [Spike(), weights])
    assert torch.equal(weights.seen[8][0], weights.seen[9][0])
    name = {"loss_spike": "loss", "grad_spike": "gradient norm"}[kind]
    assert f"masked 10/10  the {name} is " in capsys.readouterr().err
    assert [count for _, _, count in weights.seen] == [*range(1, 10), 9]
    state = torch.load(tmp_path / "run/masked/step-00000010.pt", weights_only=True)
    assert len(state["state"]["callbacks"]["Guard"]["norms"]) == 8


@pytest.mark.parametrize("guard", [{"rollbacks": -1}, {"in_a_row": 0}, {"window": 7}])
def test_settings_that_make_no_sense(toy: dict[str, Any], guard: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=f"guard.{next(iter(guard))}="):
        resolve({**toy, "guard": guard})


@pytest.mark.slow
def test_killed_after_a_roll_back_and_resumed(toy: dict[str, Any], tmp_path: Path) -> None:
    """Before the next checkpoint, when only the stage's folder knows of it, and after that."""
    poison = [[5, 6, 7], "masked"]
    whole = {**toy, "folder": str(tmp_path / "whole"), "guard": {"grad_spike": 50.0, "window": 8}}
    assert run_process(whole, tmp_path / "whole.txt", poison=poison) == 0
    killed = {**whole, "folder": str(tmp_path / "run")}
    for kill in ("toy-masked 6", "toy-masked 7", "toy-masked 9"):
        code = run_process(killed, tmp_path / "killed.txt", kill, poison)
        assert code == -signal.SIGKILL
    assert run_process(killed, tmp_path / "killed.txt", poison=poison) == 0
    assert last_losses(tmp_path / "killed.txt") == last_losses(tmp_path / "whole.txt")
    for name in ("model", "live"):
        path = f"masked/{name}.safetensors"
        assert equal(tmp_path / "whole" / path, tmp_path / "run" / path)
    folders = StageFolder(tmp_path / "whole/masked"), StageFolder(tmp_path / "run/masked")
    assert folders[0].rollbacks() == folders[1].rollbacks()
    assert len(folders[0].rollbacks()) == 1
    steps = [row["step"] for row in metrics_log.read(folders[1].metrics)]
    assert steps == list(range(1, 11))


@pytest.mark.slow
def test_ranks_decide_alike(toy: dict[str, Any], tmp_path: Path) -> None:
    """Only the second rank has a NaN: both skip, or they would wait for each other for ever."""
    raw = {**toy, "folder": str(tmp_path / "run"), "evaluate": {"every": 5, "samples": 19}}
    poison = [[2, 5, 6, 7], "masked", 1]
    assert run_process(raw, tmp_path / "losses.txt", poison=poison, ranks=2) == 0
    folder = StageFolder(tmp_path / "run/masked")
    assert [(r["step"], r["to"]) for r in folder.rollbacks()] == [(7, 4)]
    rows = metrics_log.read(folder.metrics)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["guard/skipped"] for row in rows] == [0] + [1] * 9
    alone = {**raw, "folder": str(tmp_path / "alone")}
    assert run_process(alone, tmp_path / "alone.txt", poison=[*poison[:2], 0]) == 0
    expected = metrics_log.read(tmp_path / "alone/masked/metrics.jsonl")
    for key in ("train/loss", "train/grad_norm", "eval/live/q06", "eval/live/mean", "eval/ema/q94"):
        found = [row[key] for row in rows if row.get(key) is not None]
        assert found == pytest.approx(
            [r[key] for r in expected if r.get(key) is not None], rel=1e-3
        )
        assert found


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)
    assert folder.rollbacks() == []
    folder.add_rollback(7, 4, "the loss is nan")
    folder.add_rollback(9, 4, "again")
    assert [r["reason"] for r in folder.rollbacks()] == ["the loss is nan", "again"]
    assert json.loads((tmp_path / "rollbacks.json").read_text())[0]["to"] == 4

"""Trainings of the toy source, in this process and in ones that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Callback
from composer.utils import dist
from safetensors.torch import load_file

from tests.checkout import ROOT
from tests.training.helpers.groups import make_encoders, make_source, settings
from training.config.load import resolve
from training.config.plan import TrainingPlan
from training.run.preflight import check

# argv: settings as JSON, a file for the losses, "RUN STEP" after which the process kills itself,
# and what `Poison` takes, as JSON.
KILLED_RUN = """
import json, os, signal, sys
from composer import Callback
from tests.training.helpers.runs import Poison
from training.run.trainer import run
from training.config.load import resolve
from training.run.preflight import check

class Record(Callback):
    def batch_end(self, state, logger):
        place = f"{state.run_name} {state.timestamp.batch.value}"
        with open(sys.argv[2], "a") as file:
            print(place, repr(state.total_loss_dict["loss/train/total"]), file=file)
        if place == sys.argv[3]:
            os.kill(os.getpid(), signal.SIGKILL)

run(check(resolve(json.loads(sys.argv[1]))), [Record(), Poison(*json.loads(sys.argv[4]))])
"""


def make_toy(folder: Path, **options: Any) -> dict[str, Any]:
    """Settings of a run over shards made there; tests set their own folder."""
    encoders = make_encoders(folder / "encoders")
    make_source(folder / "data", encoders, **options)
    return settings(folder / "data", encoders, folder / "unset")


def plan_of(data: dict[str, Any], path: Path, **changes: Any) -> TrainingPlan:
    return check(resolve({**data, "folder": str(path), **changes}))


def equal(a: Path, b: Path) -> bool:
    """Whether two weights files hold the same bits."""
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Watch(Callback):
    """Losses and learning rates of every step, by run name."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}
        self.rates: dict[str, list[float]] = {}

    def batch_end(self, state: Any, logger: Any) -> None:
        loss = state.total_loss_dict["loss/train/total"]
        self.losses.setdefault(state.run_name, []).append(loss)
        self.rates.setdefault(state.run_name, []).append(state.optimizers[0].param_groups[0]["lr"])


class Poison(Callback):
    """Gradients that are no numbers.

    Args:
        steps: where; 1 is the first.
        key: only while this is the stage's part of the keys of random numbers.
        rank: only on this one.
    """

    def __init__(self, steps: Collection[int] = (), key: str = "", rank: int = 0) -> None:
        self.steps = steps
        self.key = key
        self.rank = rank

    def after_backward(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value + 1 not in self.steps or dist.get_global_rank() != self.rank:
            return
        model = getattr(state.model, "module", state.model)
        if self.key in ("", model.objective.stage):
            next(iter(model.parameters())).grad.fill_(float("nan"))


def run_process(
    raw: dict[str, Any],
    losses: Path,
    kill_at: str = "never",
    poison: Sequence[Any] = (),
    ranks: int = 0,
) -> int:
    """Trains in a process of its own, which kills itself after the step it is told; with `ranks`,
    in so many under Composer's launcher."""
    arguments = [json.dumps(raw), str(losses), kill_at, json.dumps(poison)]
    command = [sys.executable, "-W", "ignore", "-c", KILLED_RUN]
    if ranks:
        script = losses.with_suffix(".py")
        script.write_text(KILLED_RUN)
        command = [Path(sys.executable).parent / "composer", "-n", str(ranks), script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *arguments], env=env, timeout=300).returncode


def last_losses(path: Path) -> dict[str, str]:
    """Step -> loss as written last; a resumed run repeats the steps since its checkpoint."""
    return dict(line.rsplit(" ", 1) for line in path.read_text().splitlines())

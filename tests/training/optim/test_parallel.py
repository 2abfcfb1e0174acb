"""FSDP2: ranks with a part of every weight train as one with all of them.

What Composer and torch do on CUDA devices they do here on two processes over gloo: the same
Trainer, `fully_shard` and collectives. In float64, because torch 2.7 sums float32 gradients over
gloo where it means to average them.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Precision
from composer.distributed.fsdp2 import create_mixed_precision_policy
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from composer.models import ComposerModel
from safetensors.torch import load_file

from tests.training.helpers.groups import SHIPPED, make_encoders, make_source, settings
from tests.training.helpers.networks import SMALL, inputs, random_model
from tests.training.helpers.runs import Poison, plan_of, run_process
from tests.training.observe.test_sample_images import PROMPTS, pictures
from tests.training.test_ranks import launched
from training.config.load import resolve
from training.generator import Generator
from training.network.blocks import DiTBlock
from training.network.decoder import DecoderBlock
from training.objectives.edm import EDM
from training.objectives.sampler import sample
from training.observe import metrics_log
from training.optim import parallel
from training.run import trainer
from training.train import main

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own

FSDP2 = {"parallel": "fsdp2"}

# argv: the rank, a file to meet at. The backend traces as inductor does, and does not take minutes.
COMPILED = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tests.training.helpers.networks import inputs, random_model
from training.optim import parallel
dist.init_process_group("gloo", f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
losses = [[], []]
for found, compiled in zip(losses, (False, True)):
    network = random_model()
    if compiled:
        network.compile_blocks("aot_eager")
    for module in filter(parallel.is_unit, network.modules()):
        fully_shard(module)
    fully_shard(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(3):
        loss = network(*inputs()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
torch.testing.assert_close(*map(torch.stack, losses), rtol=1e-9, atol=0)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of two short stages in float64 with all that touches weights in parts: clipping,
    micro-batches, moments that go on, two averages, evaluation. Tests set their own folder."""
    folder = tmp_path_factory.mktemp("parallel")
    encoders = make_encoders(folder / "encoders")
    make_source(folder / "data", encoders)
    raw = settings(folder / "data", encoders, folder / "unset")
    raw |= {"precision": "fp64", "evaluate": {"every": 3, "samples": 5, "bins": 2}}
    raw["defaults"] |= {"ema": [0.9, {"power": 0.1}], "clip": 0.3, "microbatch": 2}
    raw["stages"]["masked"]["steps"], raw["stages"]["full"]["steps"] = 6, 5
    return raw


@pytest.fixture(scope="module")
def alone(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one rank."""
    path = tmp_path_factory.mktemp("alone") / "run"
    trainer.run(plan_of(data, path))
    return path


def same_run(found: Path, expected: Path) -> None:
    """Weights, averages and figures to 1e-9, but for what a float32 of Composer's holds."""
    for stage in ("masked", "full"):
        for name in ("live", "model", "ema-power-0.1"):
            own, other = (load_file(p / stage / f"{name}.safetensors") for p in (found, expected))
            assert own.keys() == other.keys()
            for key, value in other.items():
                assert own[key].dtype == torch.float64
                assert torch.allclose(own[key], value, rtol=1e-9, atol=1e-9), (stage, name, key)
        rows, others = (metrics_log.read(p / stage / "metrics.jsonl") for p in (found, expected))
        assert len(rows) == len(others)
        for row, other in zip(rows, others, strict=True):
            for key in other:
                if key in ("train/loss", "train/grad_norm") or key.startswith("eval/"):
                    close = other[key] and pytest.approx(other[key], rel=1e-6)  # None: not finite
                    assert row[key] == close, (stage, key)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (1, "parallel=fsdp2: one rank has nothing to share weights with; start it with `composer"),
        (2, "parallel=fsdp2: no CUDA device here, and it is for weights that do not fit into one"),
    ],
)
def test_a_machine_that_cannot(
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    ranks: int,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in launched(rank=0, world=ranks, per_node=ranks).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NODE_RANK", "")  # to be put back
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(data | FSDP2 | {"folder": str(tmp_path / "run")}))
    assert main([str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()
    assert main([str(path), "dry_run=true"]) == 0  # its costs can be known here


def test_what_composer_is_told(data: dict[str, Any]) -> None:
    assert parallel.settings(resolve(data)) is None
    told = parallel.settings(resolve(data | FSDP2))
    assert told is not None
    assert told.fsdp is None
    assert told.fsdp2 is not None
    assert told.fsdp2.state_dict_type == "full"
    for precision in (Precision.AMP_BF16, Precision.FP32):
        policy = create_mixed_precision_policy(precision, told.fsdp2.mixed_precision)
        assert (policy.param_dtype, policy.reduce_dtype) == (None, None)  # float32, and autocast


def test_blocks_are_gathered_one_by_one() -> None:
    """By type: each block, of the mixer, the backbone and the decoder, and the network around."""
    network = random_model(SMALL.__class__(**{**vars(SMALL), "decoder_depth": 2}))

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            network.fsdp_wrap_fn = parallel.is_unit  # pyright: ignore
            self.dit = network

        def forward(self, batch: Any) -> Any: ...

        def loss(self, outputs: Any, batch: Any) -> Any: ...

    root = Model()
    chosen = generate_composer_model_policy(root)._run_policy(root, set(), {})
    assert network.decoder is not None
    blocks = [*network.patch_mixer, *network.blocks, *network.decoder.blocks]
    assert {*chosen} == {network, *blocks}
    assert {type(block) for block in blocks} == {DiTBlock, DecoderBlock}


def test_captions_that_are_read_at_each_step_give_the_same_pictures() -> None:
    network = random_model().float()
    noise, _, y = (value.float() for value in inputs())
    mask = torch.arange(y.shape[1]) < torch.tensor([[1], [3], [7]])
    expected = sample(network, EDM(), noise, y, mask, steps=3)
    found = sample(parallel.CaptionsEachTime(network), EDM(), noise, y, mask, steps=3)
    assert torch.allclose(found, expected, atol=1e-5)
    assert parallel.for_sampling(network) is network


@pytest.mark.slow
def test_bad_steps_of_one_rank_and_muon(data: dict[str, Any], tmp_path: Path) -> None:
    """Both skip them, and go back together after three; matrices are whole where they have to be.
    What comes of it is what one rank gives."""
    poison = [[3, 5, 6, 7], "masked", 0]
    stages = {name: dict(stage) for name, stage in data["stages"].items()}
    stages["masked"] |= {"steps": 8, "save_every": 2}
    raw = data | {"stages": stages, "optimizer": {"muon": {}}}
    trainer.run(plan_of(raw, tmp_path / "alone"), [Poison(*poison)])
    run = raw | FSDP2 | {"folder": str(tmp_path / "run")}
    assert run_process(run, tmp_path / "losses.txt", poison=poison, ranks=2) == 0
    for folder in (tmp_path / "alone", tmp_path / "run"):
        assert len(json.loads((folder / "masked/rollbacks.json").read_text())) == 1
    same_run(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks(data: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    """Killed with parts, goes on whole; and the other way round: checkpoints know no parts."""
    parts, whole = (data | f | {"folder": str(tmp_path / "run")} for f in (FSDP2, {}))
    losses = tmp_path / "losses.txt"
    assert run_process(parts, losses, "toy-masked 5", ranks=2) != 0
    assert run_process(whole, losses, "toy-full 4") == -signal.SIGKILL
    state = torch.load(tmp_path / "run/masked/step-00000006.pt", weights_only=True)["state"]
    assert {type(value) for value in state["model"].values()} == {torch.Tensor}
    assert run_process(parts, losses, ranks=2) == 0
    same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_sheets_are_what_generate_paints(tmp_path: Path) -> None:
    make_source(tmp_path / "data", SHIPPED)
    stage = {"steps": 2, "lr": 1e-3, "mask": "deferred", "mask_ratio": 0.5}
    ask = {"every": 1, "prompts": PROMPTS, "steps": 3, "seed": 5, "guidance": 2.0}
    raw = settings(tmp_path / "data", SHIPPED, tmp_path / "run") | FSDP2
    raw |= {"stages": {"masked": stage}, "samples": ask, "evaluate": {"every": 0}}
    assert run_process(raw, tmp_path / "losses.txt", ranks=2) == 0
    expected = Generator(str(tmp_path / "run"), "cpu").generate(
        PROMPTS, guidance=2.0, steps=3, seed=5
    )
    found = pictures(tmp_path / "run/masked/samples/step-00000002.png", 2)
    assert np.abs(found.astype(int) - expected).max() <= 1
    rows = metrics_log.read(tmp_path / "run/masked/metrics.jsonl")
    assert not any("samples/failed" in row for row in rows)


@pytest.mark.slow
def test_compiled_blocks_in_parts(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", COMPILED]
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path / "meet")]) for r in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]

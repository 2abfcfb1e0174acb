"""Samples that were taken out: no run streams them from its next start on."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core import drops
from pipeline.core.errors import SettingError
from pipeline.core.store import Store
from tests.training.helpers.groups import Encoders, make_source, settings
from training.config.load import resolve
from training.config.plan import TrainingPlan
from training.data.loader import LatentText, Sample, make_dataset, make_loader
from training.run.preflight import check


def plan_of(root: Path, encoders: Encoders, **data: Any) -> TrainingPlan:
    raw = settings(root, encoders, root / "run")
    return check(resolve({**raw, "data": raw["data"] | data}))


def all_samples(dataset: LatentText) -> list[Sample]:
    return [dataset[i] for i in range(dataset.size)]


DROPPED = {
    "00000": ["000000000", "000000007", "000000008", "000000019"],
    "00002": ["000020001"],  # of another split
    "00009": ["000090000"],  # of a shard that is not there
}


def drop(root: Path, keys: dict[str, list[str]], source: str = "toy") -> set[str]:
    """Takes samples out; all their keys."""
    drops.add(Store(root), source, keys)
    return {key for found in keys.values() for key in found}


@pytest.mark.parametrize("workers", [0, 2])
def test_dropped_samples_are_never_streamed(
    tmp_path: Path, encoders: Encoders, workers: int
) -> None:
    make_source(tmp_path, encoders)
    gone = drop(tmp_path, DROPPED)
    plan = plan_of(tmp_path, encoders)
    (source,) = plan.data["masked"]
    assert source.samples == 36
    dataset = make_dataset(plan, "masked")
    kept = {f"{shard:05d}{i:04d}" for shard in (0, 1) for i in range(20)} - gone
    samples = all_samples(dataset)
    assert [sample["key"] for sample in samples] == sorted(kept)
    for found in samples:  # each with its own latent and caption
        number = int(found["key"][5:])
        assert found["latent"][0, 0, 0] == number
        assert found["caption"] == f"caption {number % 7} of {found['key'][:5]}"
    loader = make_loader(dataset, workers, trimmed=True)
    for _ in range(2):
        numbers = torch.cat([batch["latents"][:, 0, 0, 0] for batch in loader]) / 0.5 + 0.25
        seen = numbers.round().int().tolist()
        assert len(seen) == 32  # four batches of eight; what is left over is left out
        assert all(seen.count(i) <= 1 for i in (0, 7, 8, 19))  # shard 00001 has these as well
    assert {sample["key"] for sample in dataset} <= kept


def test_a_shard_that_was_dropped_whole(tmp_path: Path, encoders: Encoders) -> None:
    make_source(tmp_path, encoders)
    drop(tmp_path, {"00000": [f"00000{i:04d}" for i in range(20)]})
    dataset = make_dataset(plan_of(tmp_path, encoders), "masked")
    assert dataset.num_shards == 1
    assert [sample["key"] for sample in all_samples(dataset)] == [
        f"00001{i:04d}" for i in range(20)
    ]
    drop(tmp_path, {"00001": [f"00001{i:04d}" for i in range(20)]})
    with pytest.raises(SettingError, match="toy: every sample of split train was dropped"):
        plan_of(tmp_path, encoders)


def test_drops_count_for_the_batch_size(tmp_path: Path, encoders: Encoders) -> None:
    make_source(tmp_path, encoders, samples=5)
    plan_of(tmp_path, encoders)
    drop(tmp_path, {"00000": ["000000001", "000000002", "000000003"]})
    with pytest.raises(SettingError, match="has only 7 samples"):
        plan_of(tmp_path, encoders)


def test_drops_of_one_source_touch_no_other(tmp_path: Path, encoders: Encoders) -> None:
    make_source(tmp_path, encoders)
    make_source(tmp_path, encoders, name="more", samples=11, seed=1)
    drop(tmp_path, {"00001": ["000010003"]}, source="more")
    dataset = make_dataset(plan_of(tmp_path, encoders, sources=["more", "toy"]), "masked")
    keys = [sample["key"] for sample in all_samples(dataset)]
    assert len(keys) == 2 * 11 + 2 * 20 - 1
    assert keys.count("000010003") == 1
    pickled = pickle.loads(pickle.dumps(dataset.shards))  # for loader processes that are spawned
    assert [shard.samples for shard in pickled] == [11, 10, 20, 20]
    assert pickled[1].get_sample_data(3) == dataset.shards[1].get_sample_data(3)


@pytest.mark.parametrize("batches", [2, 5])
def test_a_resumed_run_leaves_them_out_as_well(
    tmp_path: Path, encoders: Encoders, batches: int
) -> None:
    """Also where the epoch is by now shorter than what was seen of it."""
    make_source(tmp_path, encoders)
    loader = make_loader(make_dataset(plan_of(tmp_path, encoders), "masked"), 0, trimmed=True)
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    gone = drop(tmp_path, DROPPED)
    dataset = make_dataset(plan_of(tmp_path, encoders), "masked")
    resumed = make_loader(dataset, 0, trimmed=True)
    resumed.load_state_dict(state)
    assert len(list(resumed)) == max(0, (36 - 8 * batches) // 8)
    assert len(list(resumed)) == 4
    assert not gone & {sample["key"] for sample in dataset}


def test_without_drops_no_list_of_keys_is_read(tmp_path: Path, encoders: Encoders) -> None:
    make_source(tmp_path, encoders)
    plan = plan_of(tmp_path, encoders)
    for path in tmp_path.glob("toy/latents/**/*.parquet"):
        path.write_bytes(b"")
    assert make_dataset(plan, "masked").size == 40


def test_groups_of_an_older_version_name_the_command(tmp_path: Path, encoders: Encoders) -> None:
    make_source(tmp_path, encoders)
    (path,) = tmp_path.glob("toy/latents/**/index.json")
    index = json.loads(path.read_text())
    for record in index["inputs"]:
        del record["keys"]
    path.write_text(json.dumps(index))
    plan = plan_of(tmp_path, encoders)
    assert make_dataset(plan, "masked").size == 40
    drop(tmp_path, DROPPED)
    for run in (lambda: plan_of(tmp_path, encoders), lambda: make_dataset(plan, "masked")):
        with pytest.raises(SettingError, match=r"pipeline run encode --source toy.* --stale"):
            run()


RANK = """
import json, sys
from pathlib import Path
from torch import distributed
from training.config.load import resolve
from training.data.loader import make_dataset, make_loader
from training.run.preflight import check
raw = json.loads(Path(sys.argv[1]).read_text())
distributed.init_process_group("gloo")
if distributed.get_rank():  # a list that only the first rank has seen counts on all of them
    from pipeline.core import drops
    drops.read = lambda store, source: {}
dataset = make_dataset(check(resolve(raw)), "masked")
loader = make_loader(dataset, 2, trimmed=True)
for epoch in range(2):
    print(json.dumps([epoch, [n for b in loader for n in b["latents"][:, 0, 0, 0].tolist()]]))
print(json.dumps(["size", dataset.size]))
"""


@pytest.mark.slow
def test_ranks_share_what_is_left(tmp_path: Path, encoders: Encoders) -> None:
    """Two ranks with two workers each: every sample that is left once an epoch, no other."""
    make_source(tmp_path, encoders)
    drop(tmp_path, DROPPED)
    config, script = tmp_path / "config.json", tmp_path / "rank.py"
    raw = settings(tmp_path, encoders, tmp_path / "run")
    raw["defaults"]["batch_size"] = 4
    config.write_text(json.dumps(raw))
    script.write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    result = subprocess.run(
        [*launcher, str(script), str(config)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [size for name, size in lines if name == "size"] == [36, 36]
    expected = sorted([*range(20)] + [i for i in range(20) if i not in (0, 7, 8, 19)])
    for epoch in range(2):
        values = [value for name, found in lines if name == epoch for value in found]
        assert sorted(round(value / 0.5 + 0.25) for value in values) == expected

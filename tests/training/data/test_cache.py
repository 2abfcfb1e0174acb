"""The trainer's cache: whose a file is, what is fetched anew, and how much is kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import BrokenShard, SettingError
from pipeline.core.store import Store
from tests.training.helpers.groups import Encoders, make_source, settings
from training.config.load import resolve
from training.config.plan import TrainingPlan
from training.data import shard_files
from training.data.loader import make_dataset
from training.data.mapped import Maps
from training.run.preflight import check


def plan_of(
    root: str, encoders: Encoders, cache: Path, run: str = "run", **data: Any
) -> TrainingPlan:
    raw = settings(Path("unset"), encoders, cache.parent / run)
    data = {"root": root, "cache": str(cache), **data}
    return check(resolve({**raw, "data": raw["data"] | data}))


def first(plan: TrainingPlan) -> dict[str, tuple[bytes, bytes]]:
    """Key -> what is streamed, by a process that has mapped nothing yet."""
    shard_files._maps = Maps()
    samples = list(make_dataset(plan, "masked"))
    return {s["key"]: (s["latent"].tobytes(), s["tokens"].tobytes()) for s in samples}


def sizes_of(cache: Path) -> Iterator[int]:
    for path in cache.rglob("*"):
        if path.suffix in (".mds", ".parquet"):
            with contextlib.suppress(FileNotFoundError):  # another thread made room
                yield path.stat().st_size


@pytest.fixture(params=["zstd", "remote"])
def make(request: pytest.FixtureRequest, tmp_path: Path, encoders: Encoders) -> Any:
    """Makes, or makes anew, a root that has to be cached, and a plain twin; their names."""

    def make(name: str, **options: Any) -> tuple[str, str]:
        plain = str(tmp_path / f"{name}-plain")
        make_source(plain, encoders, **options)
        if request.param == "zstd":
            root = str(tmp_path / name)
            make_source(root, encoders, compression="zstd", **options)
        else:
            root = f"memory://{tmp_path.name}/{name}"
            make_source(root, encoders, **options)
        return root, plain

    return make


def test_two_roots_share_a_cache(make: Any, encoders: Encoders, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, seed in (("a", 1), ("b", 2), ("a", 1)):
        root, plain = make(name, seed=seed)
        assert first(plan_of(root, encoders, cache)) == first(plan_of(plain, encoders, cache))


def test_a_root_that_was_encoded_anew(make: Any, encoders: Encoders, tmp_path: Path) -> None:
    """Under the same names; and shards that were added are seen."""
    cache = tmp_path / "cache"
    for seed, splits in ((1, ("train",) * 2), (2, ("train",) * 2), (2, ("train",) * 4)):
        root, plain = make("a", seed=seed, splits=splits)
        found = first(plan_of(root, encoders, cache))
        assert found == first(plan_of(plain, encoders, cache))
        assert len(found) == 20 * len(splits)


def test_a_cache_that_is_partly_filled(make: Any, encoders: Encoders, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    root, plain = make("a")
    expected = first(plan_of(plain, encoders, cache))
    assert first(plan_of(root, encoders, cache)) == expected
    files = sorted(path for path in cache.rglob("*") if path.suffix in (".mds", ".parquet"))
    assert len(files) == 6  # of two shards: latents, text and its keys
    for number, path in enumerate(files):
        if number % 3:
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()
    assert first(plan_of(root, encoders, cache)) == expected
    assert not [*cache.rglob("*.part"), *cache.rglob(".*.tmp-*")]


def test_nothing_is_fetched_twice(make: Any, encoders: Encoders, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    root, _ = make("a")
    states = []
    for run in ("one", "two"):
        first(plan_of(root, encoders, cache, run))
        files = [path for path in cache.rglob("*") if path.suffix in (".mds", ".parquet")]
        states.append({path: path.stat().st_ino for path in files})
    assert states[0] == states[1]


def test_a_limit_bounds_the_cache(make: Any, encoders: Encoders, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    root, plain = make("a", splits=("train",) * 12)
    expected = first(plan_of(plain, encoders, cache))
    with pytest.raises(SettingError, match=r"data.cache_limit: .*at least four times that, "):
        first(plan_of(root, encoders, cache, cache_limit="20KB"))
    limit = 80_000
    plan = plan_of(root, encoders, cache, cache_limit="80 KB")
    assert plan.config.data.cache_bytes() == limit
    dataset = make_dataset(plan, "masked")
    found, most = {}, 0
    for number, sample in enumerate(dataset):
        found[sample["key"]] = sample["latent"].tobytes(), sample["tokens"].tobytes()
        if number % 10 == 0:
            most = max(most, sum(sizes_of(cache)))
    assert found == expected
    assert limit / 2 < most <= limit


def test_a_damaged_file_of_the_root(
    make: Any, encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is an error that names it, and nothing of it is kept."""
    monkeypatch.setattr(shard_files, "WAIT_S", 0.01)
    cache = tmp_path / "cache"
    root, _ = make("a")
    store = Store(root)
    plan = plan_of(root, encoders, cache)
    group = plan.data["masked"][0].latents_group
    (name,) = [n for n in store.names(group) if n.startswith("00001-") and ".mds" in n]
    store.write(f"{group}/{name}", store.read(f"{group}/{name}")[:-7])
    with pytest.raises(BrokenShard, match=rf"{name} has \d+ bytes, its commit record says"):
        first(plan)
    assert not [*(cache / group).glob("00001-*")]
    store.delete(f"{group}/{name}")
    with pytest.raises(BrokenShard, match=rf"{name} is missing"):
        first(plan)

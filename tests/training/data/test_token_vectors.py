"""Text groups in int8: the same captions and, but for rounding, the same vectors as in float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import LocalDataset

from pipeline.core import layout
from pipeline.core.errors import BrokenShard, SettingError
from pipeline.core.mds import encode_shard
from pipeline.core.tokens import dequantise
from tests.training.helpers.groups import Encoders, make_encoders, make_source, open_text, settings
from training.config.load import resolve
from training.config.plan import TrainingPlan
from training.data.loader import make_dataset, make_loader
from training.run.cost import report
from training.run.preflight import check

WIDTH = 100  # not a whole number of blocks of 64


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return make_encoders(tmp_path_factory.mktemp("encoders"), width=WIDTH)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, encoders: Encoders) -> Path:
    """Trimmed and full groups of the same vectors, in both types."""
    folder = tmp_path_factory.mktemp("root")
    for dtype in ("float16", "int8"):
        make_source(folder, encoders, text_dtype=dtype)
        make_source(folder, encoders, name="full", text="full", text_dtype=dtype)
    return folder


def group_of(encoders: Encoders, name: str, mode: str, dtype: str) -> str:
    return layout.text_group(name, encoders.text, "alt", mode, dtype)


def plan_of(root: Path, encoders: Encoders, **data: Any) -> TrainingPlan:
    raw = settings(root, encoders, root / "run")
    return check(resolve({**raw, "data": raw["data"] | data}))


@pytest.mark.parametrize(("name", "mode"), [("toy", "trimmed"), ("full", "full")])
def test_both_types_hold_the_same_captions(
    root: Path, encoders: Encoders, name: str, mode: str
) -> None:
    exact, rounded = (
        open_text(root, group_of(encoders, name, mode, dtype)) for dtype in ("float16", "int8")
    )
    stored = LocalDataset(str(root / group_of(encoders, name, mode, "int8")))
    for place in range(len(stored)):
        shard, c = f"{place // 7:05d}", place % 7
        a, b = exact.read(shard, f"{shard}{c:04d}"), rounded.read(shard, f"{shard}{c:04d}")
        assert (a.text, a.tokens.shape, a.tokens.dtype) == (b.text, b.tokens.shape, b.tokens.dtype)
        assert b.tokens.dtype == np.float16
        x, y = a.tokens.astype(float), b.tokens.astype(float)
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert cosine.min() >= 0.9995
        row = stored[place]  # the library's own reader
        assert (row["tokens"].dtype, row["scales"].dtype) == (np.int8, np.float16)
        np.testing.assert_array_equal(b.tokens, dequantise(row["tokens"], row["scales"]))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_batches_of_an_int8_group(
    tmp_path: Path, root: Path, encoders: Encoders, compression: str | None
) -> None:
    make_source(tmp_path, encoders, text_dtype="int8", compression=compression)
    plan = plan_of(tmp_path, encoders, text_dtype="int8")
    exact = {s["key"]: s for s in make_dataset(plan_of(root, encoders), "masked")}
    samples = list(make_dataset(plan, "masked"))
    assert {sample["key"] for sample in samples} == exact.keys()
    for sample in samples:
        expected = exact[sample["key"]]
        assert sample["caption"] == expected["caption"]
        np.testing.assert_array_equal(sample["latent"], expected["latent"])
        step = np.abs(expected["tokens"]).max() / 127
        assert np.abs(sample["tokens"] - expected["tokens"]).max() <= step
    batch = next(iter(make_loader(make_dataset(plan, "masked"), 0, trimmed=True)))
    assert batch["y"].shape[::2] == (8, WIDTH)


def test_the_yaml_says_which_type(root: Path, encoders: Encoders, tmp_path: Path) -> None:
    (source, *_) = plan_of(root, encoders, text_dtype="int8").data["masked"]
    assert source.text_group == group_of(encoders, "toy", "trimmed", "int8")
    assert source.text.dtype == "int8"
    (source, *_) = plan_of(root, encoders).data["masked"]
    assert source.text_group == group_of(encoders, "toy", "trimmed", "float16")
    make_source(tmp_path, encoders)
    with pytest.raises(SettingError, match="--text trimmed --text-dtype int8"):
        plan_of(tmp_path, encoders, text_dtype="int8")
    with pytest.raises(SettingError, match="text_dtype"):
        plan_of(root, encoders, text_dtype="int4")


def test_a_manifest_of_the_other_type_is_refused(tmp_path: Path, encoders: Encoders) -> None:
    store = make_source(tmp_path, encoders, text_dtype="int8")
    path = f"{group_of(encoders, 'toy', 'trimmed', 'int8')}/manifest.json"
    store.write_json(path, {**store.read_json(path), "dtype": "float16"})
    with pytest.raises(SettingError, match="text_dtype: expected int8, found float16"):
        plan_of(tmp_path, encoders, text_dtype="int8")


def test_the_estimate_counts_int8_bytes(root: Path, encoders: Encoders) -> None:
    """About the same rows, so about the same FLOPs, and fewer bytes."""
    exact, rounded = (
        [line.split() for line in report(plan_of(root, encoders, text_dtype=d)).splitlines()]
        for d in ("float16", "int8")
    )
    for a, b in zip(exact, rounded, strict=True):
        if a and a[0] in ("masked", "full") and len(a) == 7:
            assert float(b[3]) == pytest.approx(float(a[3]), rel=0.1)  # headers count as rows
            assert int(b[4].replace(",", "")) < int(a[4].replace(",", ""))
            break
    else:
        pytest.fail("no line of a stage")


def test_a_shard_of_something_else_is_named(tmp_path: Path, encoders: Encoders) -> None:
    store = make_source(tmp_path, encoders)
    group = group_of(encoders, "toy", "trimmed", "float16")
    entry = store.read_json(f"{group}/index.json")["shards"][0]
    name = entry["raw_data"]["basename"]
    other, entry = encode_shard({"key": "str"}, [{"key": "x"}], name)
    (tmp_path / group / name).write_bytes(other)
    with pytest.raises(BrokenShard, match=f"{name} has {len(other)} bytes, the index says"):
        open_text(tmp_path, group).read("00000", "000000000")
    index = store.read_json(f"{group}/index.json")
    index["shards"][0] = entry
    store.write_json(f"{group}/index.json", index)
    with pytest.raises(SettingError, match=f"{name}: holds .*no captions with their token vectors"):
        open_text(tmp_path, group).read("00000", "000000000")

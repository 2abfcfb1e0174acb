"""Shards that are damaged, refused captions, many shards: what the trainer reads and says."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.errors import BrokenShard, SettingError
from tests.training.data.test_loader import batches_of
from tests.training.helpers.groups import Encoders, make_source, settings
from training.config.load import resolve
from training.config.plan import TrainingPlan
from training.data import heldout
from training.data.loader import make_dataset, make_loader
from training.data.mapped import MAPS, Maps, map_file
from training.run.preflight import check
from training.train import _message


def plan_of(root: Path | str, encoders: Encoders, folder: Path, **data: Any) -> TrainingPlan:
    raw = settings(Path("unset"), encoders, folder)
    return check(resolve({**raw, "data": raw["data"] | {"root": str(root)} | data}))


def one(root: Path, pattern: str) -> Path:
    return sorted(root.glob(f"toy/{pattern}"))[0]


def write(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def remove(path: Path) -> None:
    path.unlink()


def garble(begin: int) -> Callable[[Path], object]:
    """Other bytes from there on, as many."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[begin : begin + 60] = bytes(255 for _ in data[begin : begin + 60])
        path.write_bytes(data)

    return change


def edit(**fields: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def column(name: str, values: list[Any]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({name: values}), path)

    return change


MDS = [cut, empty, zeros, write(b"x" * 9000), garble(0), garble(4), garble(90)]
JSON = [
    empty,
    cut,
    *map(write, (b"{}", b"[]", b"null", b"7", b"\xff\xfe", b'{"shards": 1}')),
]
WRONG = [edit(shards=[1]), edit(inputs=[{}]), edit(version=7), edit(shards={"a": 1})]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("latents/**/00000-*.mds", damage) for damage in MDS),
        *(("text/**/00000-*.mds", damage) for damage in MDS),
        *(("text/**/00000-*.parquet", damage) for damage in (cut, empty, zeros, column("a", [1]))),
        ("text/**/00000-*.parquet", column("key", [b"\xff"])),
        *(("latents/**/index.json", damage) for damage in (*JSON, *WRONG)),
        *(("text/**/index.json", damage) for damage in (cut, write(b"[]"))),
        *(("latents/**/manifest.json", damage) for damage in (*JSON, edit(vae=1, dtype=[]))),
        *(("text/**/manifest.json", damage) for damage in (empty, edit(kind=["text"]))),
        *(("latents/**/commits/00000.json", damage) for damage in (*JSON, edit(files=[1]))),
        *(("text/**/commits/00000.json", damage) for damage in (cut, edit(files={"a": {}}))),
    ],
)
def test_damage_is_a_line_that_names_file_and_remedy(
    tmp_path: Path, encoders: Encoders, file: str, damage: Callable[[Path], object]
) -> None:
    make_source(tmp_path, encoders)
    path = one(tmp_path, file)
    damage(path)
    with pytest.raises((BrokenShard, SettingError)) as error:
        list(make_dataset(plan_of(tmp_path, encoders, tmp_path / "run"), "masked"))
    message = str(error.value)
    assert str(path) in message
    assert f"`pipeline verify --repair --source toy --root {tmp_path}`" in message
    assert "\n" not in message
    assert len(message) < 700


@pytest.mark.parametrize("name", ["manifest.json", "commits/00000.json"])
def test_a_newer_version_is_no_damage(tmp_path: Path, encoders: Encoders, name: str) -> None:
    make_source(tmp_path, encoders)
    edit(schema=99, schema_version=99)(one(tmp_path, f"latents/**/{name}"))
    with pytest.raises(SettingError, match=r"schema 99, .*upgrade the package"):
        list(make_dataset(plan_of(tmp_path, encoders, tmp_path / "run"), "masked"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_hashes_are_compared_where_asked_for(tmp_path: Path, encoders: Encoders, kind: str) -> None:
    make_source(tmp_path, encoders)
    path = one(tmp_path, f"{kind}/**/00001-*.mds")
    list(make_dataset(plan_of(tmp_path, encoders, tmp_path / "run", check_hashes=True), "masked"))
    flip(path)
    list(make_dataset(plan_of(tmp_path, encoders, tmp_path / "run"), "masked"))
    plan = plan_of(tmp_path, encoders, tmp_path / "run", check_hashes=True)
    with pytest.raises(BrokenShard, match=rf"{path} differs from its commit record"):
        list(make_dataset(plan, "masked"))


@pytest.mark.parametrize("damage", [cut, empty, zeros, flip, remove])
@pytest.mark.parametrize("file", ["latents/**/00002-*.mds", "text/**/00002-*.mds"])
def test_held_out_shards(
    tmp_path: Path, encoders: Encoders, file: str, damage: Callable[[Path], object]
) -> None:
    make_source(tmp_path, encoders)
    path = one(tmp_path, file)
    plan = plan_of(tmp_path, encoders, tmp_path / "run", check_hashes=True)
    damage(path)
    with pytest.raises(BrokenShard, match=rf"{path} .*verify --repair"):
        heldout.read(plan, "masked", "heldout", 8)
    plan = plan_of(tmp_path, encoders, tmp_path / "run", check_hashes=True, skip_damaged=True)
    assert heldout.read(plan, "masked", "heldout", 8) == []


def test_a_shard_that_goes_while_it_is_read(tmp_path: Path, encoders: Encoders) -> None:
    make_source(tmp_path, encoders)
    dataset = make_dataset(plan_of(tmp_path, encoders, tmp_path / "run"), "masked")
    path = one(tmp_path, "latents/**/00001-*.mds")
    path.unlink()
    with pytest.raises(BrokenShard, match=f"{path} is missing"):
        list(dataset)


def test_a_loader_process_says_it_in_a_line(tmp_path: Path, encoders: Encoders) -> None:
    make_source(tmp_path, encoders)
    path = one(tmp_path, "latents/**/00001-*.mds")
    cut(path)
    dataset = make_dataset(plan_of(tmp_path, encoders, tmp_path / "run"), "masked")
    with pytest.raises(BrokenShard) as error:
        list(make_loader(dataset, 1, trimmed=True))
    assert _message(error.value).startswith(f"{path} has ")


# --- Skipping them


@pytest.mark.parametrize("file", ["latents/**/00001-*.mds", "text/**/00001-*.mds"])
@pytest.mark.parametrize("damage", [cut, remove])
def test_damaged_shards_are_skipped_where_asked_for(
    tmp_path: Path,
    encoders: Encoders,
    file: str,
    damage: Callable[[Path], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_source(tmp_path, encoders)
    damage(one(tmp_path, file))
    plan = plan_of(tmp_path, encoders, tmp_path / "run", skip_damaged=True)
    dataset = make_dataset(plan, "masked")
    samples = list(dataset)
    assert len(samples) == 40
    assert {sample["key"][:5] for sample in samples} == {"00000"}
    assert dataset.damaged() == [("toy", "00001")]
    said = capsys.readouterr().err
    assert said.count("shard 00001 of toy is left out from here on (1 of 2 shards)") == 1
    assert "pipeline verify --repair --source toy" in said
    batches = batches_of(plan, 0)
    for other in (batches_of(plan, 2), batches_of(plan, 0, skip=3)):
        for a, b in zip(batches, other, strict=True):
            assert torch.equal(a["latents"], b["latents"])
            assert torch.equal(a["drop"], b["drop"])


def test_a_resumed_run_skips_the_same_shards(tmp_path: Path, encoders: Encoders) -> None:
    """Also where they were put right in between."""
    make_source(tmp_path, encoders)
    path = one(tmp_path, "latents/**/00001-*.mds")
    sound = path.read_bytes()
    cut(path)
    plan = plan_of(tmp_path, encoders, tmp_path / "run", skip_damaged=True)
    loader = make_loader(make_dataset(plan, "masked"), 0, trimmed=True)
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["damaged"] == [["toy", "00001"]]
    expected = list(iterator)
    path.write_bytes(sound)
    dataset = make_dataset(plan, "masked")
    resumed = make_loader(dataset, 0, trimmed=True)
    resumed.load_state_dict(state)
    for a, b in zip(expected, resumed, strict=True):
        assert torch.equal(a["latents"], b["latents"])
    assert "damaged" not in (make_loader(make_dataset(plan, "masked"), 0, True).state_dict() or ())


def test_a_source_that_is_damaged_whole_ends_the_run(tmp_path: Path, encoders: Encoders) -> None:
    make_source(tmp_path, encoders)
    for path in tmp_path.glob("toy/latents/**/*.mds"):
        cut(path)
    plan = plan_of(tmp_path, encoders, tmp_path / "run", skip_damaged=True)
    with pytest.raises(BrokenShard, match="toy: too many of its shards are damaged"):
        list(make_dataset(plan, "masked"))


# --- Captions that were rejected


def test_pictures_without_a_caption_are_left_out(tmp_path: Path, encoders: Encoders) -> None:
    refused = ("000000003", "000010000", "000020001")
    make_source(tmp_path, encoders, refused=refused)
    plan = plan_of(tmp_path, encoders, tmp_path / "run")
    (source,) = plan.data["masked"]
    assert (source.samples, source.left_out) == (38, {"without a caption": 2})
    dataset = make_dataset(plan, "masked")
    keys = {dataset[i]["key"] for i in range(dataset.size)}
    assert len(keys) == 38
    assert not keys & {*refused}
    held = [picture.key for picture in heldout.read(plan, "masked", "heldout", 3)]
    assert held == ["000020000", "000020002", "000020003"]


def test_a_shard_without_any_caption_is_left_out(tmp_path: Path, encoders: Encoders) -> None:
    make_source(tmp_path, encoders, refused=tuple(f"00001{i:04d}" for i in range(20)))
    plan = plan_of(tmp_path, encoders, tmp_path / "run")
    assert plan.data["masked"][0].left_out == {"without a caption": 20}
    assert {sample["key"][:5] for sample in make_dataset(plan, "masked")} == {"00000"}


# --- Many of them


def test_more_shards_than_descriptors(tmp_path: Path, encoders: Encoders) -> None:
    make_source(tmp_path, encoders, samples=2, splits=("train",) * 30)
    dataset = make_dataset(plan_of(tmp_path, encoders, tmp_path / "run"), "masked")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 12, hard))
        kept = [dataset[i] for i in range(dataset.size)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len({sample["key"] for sample in kept}) == 60
    assert [int(sample["latent"][0, 0, 0]) for sample in kept] == [0, 1] * 30


def test_maps_are_bounded_and_end_with_their_last_view(tmp_path: Path) -> None:
    maps, path = Maps(2), tmp_path / "file"
    path.write_bytes(b"0123456789")
    view = np.frombuffer(map_file(str(path), 10), np.uint8)[2:4]
    for number in range(5):
        maps.add(str(number), map_file(str(path), 10))
    assert len(maps) == 2
    assert bytes(view) == b"23"
    assert str(path) in Path("/proc/self/maps").read_text()
    del view
    maps.forget_deleted()
    assert len(maps) == 0
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert MAPS < 65530 // 2

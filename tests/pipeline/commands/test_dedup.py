"""`pipeline dedup`: equal pictures of several shards and sources, the first stays."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.commands.dedup import HASH, _later, find, take_out
from pipeline.core import drops
from pipeline.core.samples import ImageRef, InputShard, Reject
from pipeline.core.store import Store
from pipeline.stages.images import write_images
from tests.pipeline.helpers.roots import pictures


@pytest.fixture
def store(tmp_path) -> Store:
    """Two sources of two shards; picture i is the letter's number among six different ones."""
    store = Store(tmp_path)
    made = pictures()
    assert len({picture.data for picture in made}) >= 3
    for source, shards in {"coco2014": ("ab", "ba"), "openmoji": ("ac", "cc")}.items():
        for number, letters in enumerate(shards):
            shard = InputShard(f"{number:05d}", "train")
            items = []
            for index, letter in enumerate(letters):
                ref = ImageRef(f"{shard.id}{index:04d}", f"x:{letter}", letter)
                items.append(replace(made["abc".index(letter)], ref=ref))
            items.append(Reject(f"{shard.id}0009", "download", "undecodable", "ruin"))
            write_images(store, f"{source}/images", shard, {}, items, 0.0)
    return store


def test_the_first_of_equal_pictures_stays(store):
    found = find(store, ["coco2014", "openmoji"])
    assert found.pictures == 8
    assert found.new == {
        "coco2014": {"00001": ["000010000", "000010001"]},
        "openmoji": {"00000": ["000000000"], "00001": ["000010000", "000010001"]},
    }
    take_out(store, found)
    assert drops.read(store, "coco2014") == {"00001": frozenset({"000010000", "000010001"})}
    again = find(store, ["coco2014", "openmoji"])
    assert (again.new, again.before) == ({}, 5)


def test_one_source_alone(store):
    assert find(store, ["openmoji"]).new == {"openmoji": {"00001": ["000010000", "000010001"]}}


def test_copies_of_what_was_taken_down_go_as_well(store):
    drops.add(store, "coco2014", {"00000": ["000000000"]})
    found = find(store, ["coco2014", "openmoji"])
    assert "000010001" in found.new["coco2014"]["00001"]


def test_held_out_pictures_stay_and_training_gives_way(store):
    (first, *_) = pictures()
    ref = ImageRef("000020000", "x:a", "a")
    shard = InputShard("00002", "heldout")
    write_images(store, "openmoji/images", shard, {}, [replace(first, ref=ref)], 0.0)
    found = find(store, ["coco2014", "openmoji"])
    assert found.new["coco2014"] == {
        "00000": ["000000000"],
        "00001": ["000010000", "000010001"],
    }
    assert "00002" not in found.new["openmoji"]


def test_no_pictures(tmp_path):
    assert find(Store(tmp_path), ["openmoji"]).pictures == 0


def test_positions_of_later_ones_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 5, (300, 2), dtype=np.uint64).view(HASH)[:, 0]
    seen: set[bytes] = set()
    expected = []
    for position, item in enumerate(hashes):
        if item.tobytes() in seen:
            expected.append(position)
        seen.add(item.tobytes())
    assert _later(hashes).tolist() == expected


def test_the_command(store, monkeypatch, capsys):
    for arguments, expected in ((["--dry-run"], "would be out"), ([], "are out now")):
        monkeypatch.setattr(sys, "argv", ["pipeline", "dedup", "--root", store.root, *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert f"openmoji: 3 duplicates in 2 shards {expected}" in out
        assert "8 pictures, 5 equal to an earlier one" in out
    assert find(store, ["coco2014", "openmoji"]).new == {}

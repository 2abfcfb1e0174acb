from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

from pipeline.core import drops, process
from pipeline.core.commits import (
    differences,
    plain_stem,
    read_commits,
    read_file,
    write_shard,
)
from pipeline.core.errors import SettingError, StorageError, TooManyRejects
from pipeline.core.samples import InputShard, Reject
from pipeline.core.store import Store, fingerprint, temporary_name
from tests.pipeline.helpers.roots import tree


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        return Store(tmp_path / "root")
    return Store(f"memory://{tmp_path.name}")


def test_files_come_back_whole(store):
    store.write("a/b/x.bin", b"12")
    store.write("a/b/x.bin", b"345")
    assert store.read("a/b/x.bin") == b"345"
    assert store.names("a/b") == ["x.bin"]
    assert store.folders("a") == ["b"]
    assert store.exists("a/b/x.bin")
    assert not store.exists("a/b/y.bin")
    assert store.names("nowhere") == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write("x", b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match="disk full"):
        store.write("x", b"new")
    assert store.read("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_leftovers_of_dead_processes_go_and_of_living_ones_stay(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from pipeline.core.store import temporary_name; print(temporary_name('x'))",
    ]
    dead = tmp_path / subprocess.run(command, capture_output=True, text=True).stdout.strip()
    mine = tmp_path / temporary_name("x")
    # The same number, given to another process since.
    reused = tmp_path / mine.name.replace(process.identity(), process.identity()[:-1] + "x")
    elsewhere = tmp_path / mine.name.replace(process.host(), "other")
    for path in (dead, mine, reused, elsewhere):
        path.write_bytes(b"half")
    store = Store(tmp_path)
    assert store.names("") == []
    assert store.remove_leftovers("") == 2
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere])
    assert store.remove_leftovers("", alone=True) == 1
    assert list(tmp_path.iterdir()) == [mine]


def commit(store, **inputs):
    return write_shard(
        store,
        "s/latents",
        InputShard("00003", "train"),
        inputs,
        files={"00003.bin": b"abc"},
        keys=["k1", "k2"],
        rejects=[
            Reject("k3", "encode", "undecodable", "truncated"),
            Reject("k4", "encode", "x", ""),
        ],
    )


def test_a_commit_names_its_files_and_counts_its_rejects(store):
    written = commit(store, vae="a")
    read = read_commits(store, "s/latents")
    assert read == {"00003": written}
    assert written.samples == 2
    assert written.rejects == {"undecodable": 1, "x": 1}
    rejects = f"rejects/00003-{written.fingerprint}.parquet"
    assert set(written.files) == {"00003.bin", rejects}
    for name, facts in written.files.items():
        assert len(store.read(f"s/latents/{name}")) == facts["bytes"]


def test_the_commit_is_written_last(tmp_path, monkeypatch):
    order = []
    store = Store(tmp_path)
    write = store.write
    monkeypatch.setattr(store, "write", lambda path, data: (order.append(path), write(path, data)))
    commit(store)
    assert order[-1] == "s/latents/commits/00003.json"
    assert len(order) == 3


def test_equal_inputs_give_equal_bytes(tmp_path):
    trees = []
    for name in ("a", "b"):
        commit(Store(tmp_path / name), vae="x", resolution=256)
        trees.append(tree(tmp_path / name))
    assert trees[0] == trees[1]
    assert len(trees[0]) == 3


def test_a_newer_schema_is_refused_with_both_versions(tmp_path):
    commit(Store(tmp_path))
    path = tmp_path / "s/latents/commits/00003.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(SettingError, match=r"schema 99.* up to 2"):
        read_commits(Store(tmp_path), "s/latents")


def test_fingerprint_ignores_order_and_sees_values():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_differences_say_why():
    old = {"vae": {"name": "a", "weights": "1"}, "crop": "center"}
    new = {"vae": {"name": "a", "weights": "2"}, "crop": "center", "seed": 1}
    assert differences(old, new) == ["seed: None -> 1", "vae.weights: 1 -> 2"]
    assert differences({"vae": {"weights_sha256": "1"}}, {"vae": {"weights_sha256": "2"}}) == [
        "vae weights hash differs"
    ]
    # A commit's shard is a nest of lists, which says nothing to a person.
    nest = ["00000", "train", [["a.jpg", 17], ["b.jpg", 19]]]
    assert differences({"shard": nest}, {"shard": [*nest[:2], []]}) == [
        "its source lists other pictures for it"
    ]
    assert differences({"clean": ["habits", "lower"]}, {"rules": {"a": 1}}) == [
        "clean: habits,lower -> None",
        "rules: None -> a=1",
    ]
    assert differences({"images": "1"}, {"images": "2", "dropped": "3"}) == [
        "samples were dropped",
        "images were made anew",
    ]


def test_a_shard_of_rejects_is_not_committed(store):
    rejects = [Reject(f"k{i}", "download", "failed_to_download", "timed out") for i in range(19)]
    write = functools.partial(write_shard, store, "g", InputShard("0", "train"), {}, {})
    with pytest.raises(TooManyRejects, match=r"19 of 20 .*\(19 failed_to_download; e.g. k0: timed"):
        write(["good"], rejects)
    assert read_commits(store, "g") == {}
    assert write(["good"], rejects, max_reject_rate=0.95).samples == 1


def test_a_second_generation_gets_names_of_its_own(store):
    shard = InputShard("00003", "train")
    names = []
    for data, inputs in ((b"one", {"v": 1}), (b"one", {"v": 2}), (b"two", {"v": 3})):
        stem = plain_stem(store, "g", shard.id, {".tar": data})
        names.append(stem)
        write_shard(store, "g", shard, inputs, {f"{stem}.tar": data}, ["k"], [])
    assert names[:2] == ["00003", "00003"]
    assert names[2].startswith("00003-")
    assert store.read("g/00003.tar") == b"one"
    (commit,) = read_commits(store, "g").values()
    assert read_file(store, "g", commit, ".tar") == b"two"


def test_drops_add_up_and_are_read_by_shard(store):
    drops.add(store, "s", {"00001": ["b", "a"], "00000": ["x"]})
    drops.add(store, "s", {"00001": ["c", "a"]})
    drops.add(store, "s", {"00001": ["a", "b"], "00000": ["x"]})  # the first again
    assert len(store.names("s/drops")) == 2
    assert drops.read(store, "s") == {"00000": frozenset("x"), "00001": frozenset("abc")}
    assert drops.inputs([]) == {}
    assert drops.inputs("ab") == drops.inputs("ba")
    store.write_json("s/drops/new.json", {"schema": 99, "shards": {}})
    with pytest.raises(SettingError, match="schema 99"):
        drops.read(store, "s")


def test_names_that_look_like_patterns_are_names():
    import fsspec

    names = ["a[1].jpg", "a*.jpg", "a?.jpg", "plain.jpg", "[ab]/c.jpg", "a1.jpg"]
    store = Store("memory://patterns")
    try:
        for name in names:
            store.write(name, name.encode())
        wanted = [*names, "gone[1].jpg", "b*"]
        assert list(store.read_many(wanted)) == [*(n.encode() for n in names), None, None]
        assert sorted(entry.path for entry in store.walk("")) == sorted(names)
    finally:
        fsspec.filesystem("memory").rm("/patterns", recursive=True)

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from pipeline.core.commits import differences, read_commits, write_shard
from pipeline.core.errors import SettingError
from pipeline.core.samples import InputShard, Reject
from pipeline.core.store import Store, fingerprint
from tests.pipeline.roots import tree


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
    with pytest.raises(OSError, match="disk full"):
        store.write("x", b"new")
    assert store.read("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_leftovers_of_dead_processes_go_and_of_living_ones_stay(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    host = socket.gethostname()
    gone = tmp_path / f".x.mds.tmp-{host}-{int(dead.stdout)}-abcdef12"
    mine = tmp_path / f".x.mds.tmp-{host}-{os.getpid()}-abcdef12"
    elsewhere = tmp_path / f".x.mds.tmp-other-host-{int(dead.stdout)}-abcdef12"
    for path in (gone, mine, elsewhere):
        path.write_bytes(b"half")
    assert Store(tmp_path).remove_leftovers("") == 1
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere])
    assert Store(tmp_path).names("") == []


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
    assert set(written.files) == {"00003.bin", "rejects/00003.parquet"}
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
    with pytest.raises(SettingError, match=r"schema 99.* up to 1"):
        read_commits(Store(tmp_path), "s/latents")


def test_fingerprint_ignores_order_and_sees_values():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_differences_say_why():
    old = {"vae": {"name": "a", "weights": "1"}, "crop": "center"}
    new = {"vae": {"name": "a", "weights": "2"}, "crop": "center", "seed": 1}
    assert differences(old, new) == ["seed: None -> 1", "vae.weights: 1 -> 2"]

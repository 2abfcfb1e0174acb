from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from pipeline.core import lease, process
from pipeline.core.errors import SettingError
from pipeline.core.store import Store

GROUP = "s/latents/v/64"


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        return Store(tmp_path / "root")
    return Store(f"memory://{tmp_path.name}")


def other(owner: str, counter: int = 1) -> bytes:
    return json.dumps({"owner": owner, "command": "pipeline run", "counter": counter}).encode()


def test_it_is_there_while_the_block_runs_and_gone_after(store):
    with lease.held(store, [GROUP, "s/text/t/alt"], "pipeline run encode"):
        (name,) = store.names(f"{GROUP}/leases")
        assert store.read_json(f"{GROUP}/leases/{name}")["command"] == "pipeline run encode"
        assert store.names("s/text/t/alt/leases") == [name]
    assert store.names(f"{GROUP}/leases") == []
    assert "leases" not in store.folders(GROUP)


def test_it_is_released_when_the_block_fails(store):
    with pytest.raises(RuntimeError), lease.held(store, [GROUP], ""):
        raise RuntimeError
    assert store.names(f"{GROUP}/leases") == []


def test_a_dead_process_of_this_host_frees_it_at_once(store):
    command = [sys.executable, "-c", "from pipeline.core import process; print(process.identity())"]
    dead = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    store.write(f"{GROUP}/leases/{dead}.json", other(dead))
    started = time.monotonic()
    with lease.held(store, [GROUP], ""):
        assert len(store.names(f"{GROUP}/leases")) == 1
    assert time.monotonic() - started < 1


def test_a_living_process_of_this_host_holds_it_and_is_named(store):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as holder:
        who = process.identity(holder.pid)
        store.write(f"{GROUP}/leases/{who}.json", other(who))
        with (
            pytest.raises(SettingError, match=rf"{GROUP} is .* process {holder.pid} on .*--join"),
            lease.held(store, [GROUP], ""),
        ):
            pytest.fail("held")
        with lease.held(store, [GROUP], "", join=True):
            assert len(store.names(f"{GROUP}/leases")) == 2
        assert store.names(f"{GROUP}/leases") == [f"{who}.json"]
        holder.communicate()


def test_one_of_another_host_that_stands_still_is_freed_within_ten_seconds(store, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE_S", 1.0)
    store.write(f"{GROUP}/leases/far-1-2.json", other("far-1-2"))
    started = time.monotonic()
    with lease.held(store, [GROUP], ""):
        names = store.names(f"{GROUP}/leases")
        assert "far-1-2.json" not in names
    assert 1 <= time.monotonic() - started < 3
    assert lease.BEAT_S * 3 < 8.0 <= 10  # patience outlasts a few beats, and stays below 10 s


def test_one_of_another_host_whose_counter_rises_is_held(tmp_path):
    store = Store(tmp_path)
    path = f"{GROUP}/leases/far-1-2.json"
    store.write(path, other("far-1-2"))
    child = os.fork()
    if child == 0:
        time.sleep(1)
        store.write(path, other("far-1-2", 2))
        os._exit(0)
    with (
        pytest.raises(SettingError, match="process 1 on far"),
        lease.held(store, [GROUP], ""),
    ):
        pytest.fail("held")
    os.waitpid(child, 0)
    assert store.names(f"{GROUP}/leases") == ["far-1-2.json"]


def test_the_counter_rises_while_the_block_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    store = Store(tmp_path)
    with lease.held(store, [GROUP], ""):
        (name,) = store.names(f"{GROUP}/leases")
        deadline = time.monotonic() + 10
        while store.read_json(f"{GROUP}/leases/{name}")["counter"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_no_signature_or_password_lies_under_the_root(tmp_path):
    store = Store(tmp_path)
    link = "https://me:secret@host/list.tsv?X-Sig=secret&e=1"
    command = f"pipeline run download --set 'links={link}' --set base={link} --workers 2"
    with lease.held(store, [GROUP], command):
        (name,) = store.names(f"{GROUP}/leases")
        shown = store.read_json(f"{GROUP}/leases/{name}")["command"]
    assert "secret" not in shown
    assert shown == (
        "pipeline run download --set 'links=https://host/list.tsv' "
        "--set base=https://host/list.tsv --workers 2"
    )


HOLD = """
import sys, time
from pipeline.core import lease
from pipeline.core.errors import SettingError
from pipeline.core.store import Store
while time.time() < float(sys.argv[2]):
    pass
try:
    with lease.held(Store(sys.argv[1]), [""], "train"):
        time.sleep(1.5)
except SettingError as error:
    sys.exit(str(error))
"""


def test_of_several_that_start_at_once_one_holds_it(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(time.time() + 1.5)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1, 1, 1]
    assert all(f"{tmp_path} is being written by" in error for error in errors if error)
    assert list(tmp_path.iterdir()) == []


def test_who_was_taken_for_dead_hears_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    store = Store(tmp_path)
    with lease.held(store, [""], "") as holding:
        (name,) = store.names("leases")
        store.delete(f"leases/{name}")  # and nobody took it over
        deadline = time.monotonic() + 10
        while store.names("leases") != [name]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert holding.lost == ""
        store.write("leases/far-1-2.json", other("far-1-2"))
        store.delete(f"leases/{name}")
        while not holding.lost:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert holding.lost == f"{tmp_path} is being written by process 1 on far (pipeline run)"
        assert store.names("leases") == ["far-1-2.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_a_damaged_lease(tmp_path, content):
    store, me = Store(tmp_path), process.identity(os.getppid())
    store.write(f"leases/{me}.json", content)
    store.write("leases/notes.json", b"")
    with (
        pytest.raises(SettingError, match="of which nothing is known"),
        lease.held(store, [""], ""),
    ):
        pytest.fail("held")

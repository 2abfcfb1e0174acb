"""Files written piece by piece."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from pipeline.core.staged_file import SCRATCH_VARIABLE, scratch, staged_file
from pipeline.core.store import Store


def test_it_appears_under_its_name_or_not_at_all(tmp_path):
    store = Store(tmp_path)
    with staged_file(store, "a/b") as file:
        assert file.write(b"one ") == 4
        file.write(b"two")
        file.close()
        store.place(file.path, "a/b/c.bin")
    assert store.read("a/b/c.bin") == b"one two"
    assert (file.bytes, file.sha256()) == (7, hashlib.sha256(b"one two").hexdigest())
    with pytest.raises(TypeError), staged_file(store, "a/b") as file:
        file.write("no bytes")  # pyright: ignore
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c.bin"]


def test_on_an_object_store_it_lies_in_the_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path / "scratch"))
    store = Store("memory://bucket")
    with staged_file(store, "a") as file:
        assert file.path.parent == tmp_path / "scratch"
        file.write(b"bytes")
        file.close()
        store.place(file.path, "a/c.bin")
    assert store.read("a/c.bin") == b"bytes"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_killed_process_left_in_the_scratch_folder_goes(tmp_path, monkeypatch):
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path))
    kill = (
        "import os\nfrom pipeline.core.staged_file import scratch_folder, staged_file\n"
        "from pipeline.core.store import Store\n"
        "with staged_file(Store('memory://x'), 'a') as file, scratch_folder('list') as folder:\n"
        "    file.write(b'x')\n    open(folder + '/part', 'w').close()\n    os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", kill], check=False)
    (tmp_path / "archive.part").touch()
    assert len(list(tmp_path.iterdir())) == 3
    scratch()
    assert [path.name for path in tmp_path.iterdir()] == ["archive.part"]

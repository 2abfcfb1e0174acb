"""Every hostile archive: its members, and through the webdataset source and the stage."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.sources.files.archives import BrokenArchive, Member, is_picture, members
from pipeline.sources.webdataset import WebDataset
from pipeline.stages.download import Download
from tests.hostile import memory, pictures
from tests.hostile.archives import CASES, Archive
from tests.hostile.case import ERROR, SAMPLE
from tests.hostile.corpus import SLOW
from tests.pipeline.helpers.roots import run_here, tar_of

GOOD_NAMES = {f"{stem}.{ending}" for stem in ("0000", "9999") for ending in ("jpg", "txt")}
#: What else becomes of a case's members.
SIDE_EFFECTS = {"ungrouped.tar": {"no-caption", SAMPLE}}
MEMORY = 150_000_000  # bytes more than before: a member is 64 MiB at most


def read(path: Path) -> list[Member] | str:
    """The members, or why they cannot be had."""
    try:
        return list(members(path))
    except BrokenArchive as error:
        return str(error)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_members(tmp_path, monkeypatch, case: Archive):
    """Nothing is written, opened or run; it is over soon, and what is good around it comes."""
    path = tmp_path / case.name
    path.write_bytes(case.make())
    monkeypatch.chdir(tmp_path)
    before, began = memory.forget(), time.monotonic()
    found = read(path)
    assert time.monotonic() - began < 10
    assert memory.peak() - before < MEMORY
    assert [p.name for p in tmp_path.iterdir()] == [case.name]
    assert not Path("/tmp/microdit-hostile").exists()
    if case.verdict == ERROR:
        assert isinstance(found, str)
        assert case.name in found
        return
    assert isinstance(found, list), found
    by_name = {m.name: m for m in found}
    if not case.alone:
        assert all(by_name[name].data and not by_name[name].reason for name in GOOD_NAMES)
    own = [m for m in found if m.name not in GOOD_NAMES]
    reasons = {m.reason for m in own if m.reason}
    assert reasons == ({case.verdict} if case.by_member else set())
    for member in own:
        assert not (member.reason and member.data)
        member.detail.encode()  # it goes into a parquet
    if case.verdict == SAMPLE:
        assert any(m.data for m in own)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_through_the_stage(tmp_path, case: Archive):
    """A reject for what is its own, the good samples beside it; of a broken archive no shard."""
    path = tmp_path / case.name
    path.write_bytes(case.make())
    store = Store(tmp_path / "root")
    stage = Download("webdataset", WebDataset(tars=str(path)), max_reject_rate=1.0)
    if case.verdict == ERROR:
        with pytest.raises(BrokenArchive):
            run_here(stage, store)
        assert not store.names("webdataset/images/commits")
        return
    run_here(stage, store)
    rows = from_parquet(store.read("webdataset/images/00000.parquet")).to_pylist()
    statuses = [row["status"].replace("success", SAMPLE) for row in rows]
    if not case.alone:
        assert statuses.pop(0) == statuses.pop() == SAMPLE
    assert set(statuses) == {case.verdict} | SIDE_EFFECTS.get(case.name, set())


def test_pictures_in_a_tar_get_the_verdicts_they_get_in_a_folder(tmp_path):
    cases = [case for case in pictures.CASES if case.name not in SLOW]
    parts = []
    for number, case in enumerate(cases):
        ending = case.name.rpartition(".")[2]
        parts.append((f"{number:04d}.{ending}", case.make()))
        parts.append((f"{number:04d}.txt", b"a cat"))
    (tmp_path / "0.tar").write_bytes(tar_of(parts))
    store = Store(tmp_path / "root")
    run_here(Download("webdataset", WebDataset(tars=str(tmp_path / "0.tar")), 1.0), store)
    rows = from_parquet(store.read("webdataset/images/00000.parquet")).to_pylist()
    for case, row in zip(cases, rows, strict=True):
        verdict = case.verdict if is_picture(case.name) else "no-picture"
        assert row["status"].replace("success", SAMPLE) == verdict, (case.name, row)

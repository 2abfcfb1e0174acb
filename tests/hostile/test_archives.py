"""Every hostile archive: its members, and through the webdataset source and the stage."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from pipeline.sources.archives import BrokenArchive, Member, members
from tests.hostile.archives import CASES, Archive
from tests.hostile.case import ERROR, SAMPLE

GOOD_NAMES = {f"{stem}.{ending}" for stem in ("0000", "9999") for ending in ("jpg", "txt")}
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
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    found = read(path)
    assert time.monotonic() - began < 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
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

"""Captions of one large file, sorted once a host."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from pipeline.core.staged_file import SCRATCH_VARIABLE, scratch
from pipeline.sources.files import lookup, resumable
from pipeline.sources.files.lookup import Row, rows_of, sorted_rows


@pytest.fixture(autouse=True)
def _scratch(monkeypatch, tmp_path):
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path))


def rows(count: int) -> list[Row]:
    drawn = random.Random(1)
    return [Row(drawn.randrange(count), f"n{i}", f"caption {i}", i / 7) for i in range(count)]


@pytest.mark.parametrize("span", [1, 37, 100_000])
def test_a_range_of_rows_comes_in_order_whatever_order_they_had(monkeypatch, span):
    monkeypatch.setattr(lookup, "PENDING", 3)
    given = rows(600)
    path = sorted_rows("x", lambda: given, span)
    expected = sorted(given, key=lambda row: row.number)  # stable, as the file is
    assert rows_of(path, 0, 600) == expected
    assert rows_of(path, 50, 99) == [row for row in expected if 50 <= row.number <= 99]
    assert rows_of(path, 700, 800) == []
    assert list(scratch().iterdir()) == [path]


def test_it_is_made_once_for_an_identity():
    made = []

    def make() -> Iterator[Row]:
        made.append(1)
        yield from rows(10)

    first = sorted_rows("a@1", make, 5)
    assert sorted_rows("a@1", make, 5) == first
    assert sorted_rows("a@2", make, 5) != first
    assert len(made) == 2
    assert first.read_bytes() == sorted_rows("a@2", make, 5).read_bytes()


def test_rows_that_break_off_leave_nothing_behind():
    def make() -> Iterator[Row]:
        yield from rows(10)
        raise resumable.TransferError("cut")

    with pytest.raises(resumable.TransferError):
        sorted_rows("a", make, 2)
    assert list(scratch().iterdir()) == []
    assert rows_of(sorted_rows("a", lambda: rows(10), 2), 0, 10) != []


def test_one_shard_reads_few_row_groups(monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr(lookup, "GROUP", 50)
    path = sorted_rows("a", lambda: rows(1000), 100)
    metadata = pq.ParquetFile(path).metadata
    assert metadata.num_row_groups >= 20
    bounds = [
        (s.min, s.max)
        for g in range(metadata.num_row_groups)
        if (s := metadata.row_group(g).column(0).statistics)
    ]
    assert bounds == sorted(bounds)
    assert sum(low <= 510 and high >= 500 for low, high in bounds) <= 2

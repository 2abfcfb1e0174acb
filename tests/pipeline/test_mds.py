"""Shards written by us against mosaicml-streaming, writer and readers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.core.mds import encode_shard, index

COLUMNS = {
    "key": "str",
    "latent": "ndarray:float16:4,2,2",
    "tokens": "ndarray:float16",
    "count": "int",
    "blob": "bytes",
}


def samples(count: int, width: int = 3):
    rng = np.random.default_rng(0)
    return [
        {
            "key": f"{i:09d} é",
            "latent": rng.normal(size=(4, 2, 2)).astype("float16"),
            "tokens": rng.normal(size=(1 + i, width)).astype("float16"),
            "count": -i,
            "blob": bytes(range(i)),
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("width", [3, 300, 70_000], ids=["uint8 axes", "uint16 axes", "uint32"])
def test_bytes_equal_the_librarys_writer(tmp_path, width):
    from streaming import MDSWriter

    rows = samples(5, width)
    with MDSWriter(columns=COLUMNS, out=str(tmp_path), size_limit=None, hashes=[]) as writer:
        for row in rows:
            writer.write(row)
    data, entry = encode_shard(COLUMNS, rows, "shard.00000.mds")
    assert data == (tmp_path / "shard.00000.mds").read_bytes()
    theirs = json.loads((tmp_path / "index.json").read_text())
    ours = json.loads(index([json.dumps(entry).encode()], []))
    assert ours.pop("inputs") == []
    assert ours == theirs


def test_the_librarys_reader_opens_it_with_extra_keys(tmp_path):
    from streaming import LocalDataset

    rows = samples(7)
    data, entry = encode_shard(COLUMNS, rows, "00000-abc.mds")
    (tmp_path / "00000-abc.mds").write_bytes(data)
    record = index([json.dumps(entry).encode()], [b'{"shard": "0"}'])
    assert json.loads(record)["inputs"] == [{"shard": "0"}]
    (tmp_path / "index.json").write_bytes(record)
    dataset = LocalDataset(str(tmp_path))
    assert len(dataset) == 7
    for number, row in enumerate(rows):
        found = dataset[number]
        assert found["key"] == row["key"]
        np.testing.assert_array_equal(found["latent"], row["latent"])
        np.testing.assert_array_equal(found["tokens"], row["tokens"])
        assert found["count"] == row["count"]
        assert found["blob"] == row["blob"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("latent", np.zeros((4, 2, 2), "float32"), "float16"),
        ("latent", np.zeros((4, 2, 3), "float16"), "shape"),
        ("tokens", np.zeros((0, 3), "float16"), "non-empty"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(column, value, message):
    row = samples(1)[0] | {column: value}
    with pytest.raises(ValueError, match=message):
        encode_shard(COLUMNS, [row], "x.mds")


def test_an_empty_shard_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        encode_shard(COLUMNS, [], "x.mds")


def test_a_missing_column_is_refused():
    row = samples(1)[0]
    del row["key"]
    with pytest.raises(ValueError, match="columns"):
        encode_shard(COLUMNS, [row], "x.mds")

"""Shards written by us against mosaicml-streaming, writer and readers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pipeline.core.mds import decode_shard, encode_shard, index, stored, unpack

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


@pytest.mark.parametrize("compression", [None, "zstd", "zstd:9", "br:3", "bz2", "snappy"])
@pytest.mark.parametrize("hashes", [[], ["sha1", "xxh3_64"]])
def test_compressed_and_hashed_shards_equal_the_librarys_writer(tmp_path, compression, hashes):
    from streaming import MDSWriter

    rows = samples(5)
    options: dict[str, Any] = {"hashes": hashes, "compression": compression}
    with MDSWriter(columns=COLUMNS, out=str(tmp_path), size_limit=None, **options) as writer:
        for row in rows:
            writer.write(row)
    data, entry = encode_shard(COLUMNS, rows, "shard.00000.mds", **options)
    (theirs,) = json.loads((tmp_path / "index.json").read_text())["shards"]
    assert entry == theirs
    assert data == (tmp_path / stored(entry)["basename"]).read_bytes()
    assert len(list(decode_shard(unpack(data, entry))[1])) == 5


@pytest.mark.parametrize(
    ("dataset", "compression"),
    [("StreamingDataset", None), ("StreamingDataset", "zstd"), ("LocalDataset", None)],
)
def test_the_library_opens_shards_of_several_columns_in_subfolders(tmp_path, dataset, compression):
    import streaming

    options: dict[str, Any] = {"hashes": ["sha1"], "compression": compression}
    entries = []
    for number, columns in enumerate([COLUMNS, {"key": "str", "latent": COLUMNS["latent"]}] * 2):
        rows = [{name: row[name] for name in columns} for row in samples(3)]
        data, entry = encode_shard(columns, rows, f"part-{number}/{number:05d}.mds", **options)
        path = tmp_path / "remote" / stored(entry)["basename"]
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        entries.append(json.dumps(entry).encode())
    (tmp_path / "remote/index.json").write_bytes(index(entries, [b"{}"] * 4))
    if dataset == "LocalDataset":
        opened: Any = streaming.LocalDataset(str(tmp_path / "remote"))
    else:
        opened = streaming.StreamingDataset(
            remote=str(tmp_path / "remote"),
            local=str(tmp_path / "local"),
            batch_size=1,
            shuffle=False,
            validate_hash="sha1",
        )
    assert len(opened) == 12
    for number in range(12):
        expected = samples(3)[number % 3]
        assert opened[number]["key"] == expected["key"]
        np.testing.assert_array_equal(opened[number]["latent"], expected["latent"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "gz"}, "stamps the time"),
        ({"compression": "zip"}, "use br, bz2, snappy, zstd"),
        ({"hashes": ["crc"]}, "streaming knows"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(ValueError, match=message):
        encode_shard(COLUMNS, samples(1), "x.mds", **options)


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

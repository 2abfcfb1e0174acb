"""MDS shards and indexes, written directly: bytes in, bytes out, no clock, no state.

mosaicml-streaming's own writer publishes its index once, at the end, and in place; a kill before
that loses everything. Here a shard is a value: `encode_shard` returns its bytes and its index
entry, and the caller commits both. Layout: streaming 0.13, format version 2; the library is the
oracle in tests/pipeline/test_mds.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

VALUE_DTYPES = {"uint8": 8, "int8": 9, "float16": 18, "int32": 33, "float32": 34, "int64": 65}


def encode_shard(
    columns: Mapping[str, str], samples: Iterable[Mapping[str, Any]], basename: str
) -> tuple[bytes, dict[str, Any]]:
    """One MDS shard file.

    Args:
        columns: name -> encoding: "str", "bytes", "int", "ndarray:DTYPE" (shape stored per sample)
            or "ndarray:DTYPE:D1,D2" (fixed shape, no header).
        samples: dicts with exactly these columns; at least one.
        basename: the file's name as the index will give it.

    Returns:
        The file's bytes and its entry for `index`.

    Raises:
        ValueError: no samples, a value that does not fit its column, or a shard over 4 GiB.
    """
    names = sorted(columns)
    config = {
        "column_encodings": [columns[name] for name in names],
        "column_names": names,
        "column_sizes": [fixed_size(columns[name]) for name in names],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": None,
        "version": 2,
    }
    header = json.dumps(config, sort_keys=True).encode()
    bodies = [_encode_sample(config, sample) for sample in samples]
    if not bodies:
        raise ValueError(f"{basename}: an MDS shard needs at least one sample")
    lengths = np.array([0] + [len(body) for body in bodies], np.int64)
    offsets = lengths.cumsum() + 4 + 4 * len(lengths) + len(header)
    if offsets[-1] >= 1 << 32:
        raise ValueError(f"{basename}: {offsets[-1]} bytes, an MDS shard holds less than 4 GiB")
    data = b"".join(
        [np.uint32(len(bodies)).tobytes(), offsets.astype(np.uint32).tobytes(), header, *bodies]
    )
    raw = {"basename": basename, "bytes": len(data), "hashes": {}}
    return data, {**config, "samples": len(bodies), "raw_data": raw, "zip_data": None}


def index(entries: list[bytes], inputs: list[bytes]) -> bytes:
    """index.json over shard entries, each as JSON; `inputs`, one beside each entry, becomes a
    top-level key, which MDS readers ignore."""
    head = b'{"version": 2,\n"shards": [\n' + b",\n".join(entries)
    return head + b'\n],\n"inputs": [\n' + b",\n".join(inputs) + b"\n]}\n"


def fixed_size(encoding: str) -> int | None:
    """Bytes of every value of this encoding, or None where each value carries its length."""
    kind, *args = encoding.split(":")
    if kind == "int":
        return 8
    if kind in ("str", "bytes"):
        return None
    if kind == "ndarray" and args and args[0] in VALUE_DTYPES:
        if len(args) == 1:
            return None
        shape = [int(side) for side in args[1].split(",")]
        return int(np.prod(shape)) * np.dtype(args[0]).itemsize
    raise ValueError(f"unsupported MDS encoding {encoding!r}")


def _encode_sample(config: dict[str, Any], sample: Mapping[str, Any]) -> bytes:
    if sorted(sample) != config["column_names"]:
        raise ValueError(f"sample has columns {sorted(sample)}, not {config['column_names']}")
    sizes, values = [], []
    for name, encoding, size in zip(
        config["column_names"], config["column_encodings"], config["column_sizes"], strict=True
    ):
        value = _encode_value(encoding, sample[name])
        if size is None:
            sizes.append(len(value))
        elif size != len(value):
            raise ValueError(f"column {name}: {len(value)} bytes, {encoding} takes {size}")
        values.append(value)
    return np.array(sizes, np.uint32).tobytes() + b"".join(values)


def _encode_value(encoding: str, value: Any) -> bytes:
    kind, *args = encoding.split(":")
    if kind == "str":
        return value.encode()
    if kind == "bytes":
        return value
    if kind == "int":
        return np.int64(value).tobytes()
    if value.dtype != args[0] or value.size == 0:
        raise ValueError(f"expected a non-empty {args[0]} array, got {value.dtype} {value.shape}")
    if len(args) == 2:
        if list(value.shape) != [int(side) for side in args[1].split(",")]:
            raise ValueError(f"expected shape {args[1]}, got {value.shape}")
        return np.ascontiguousarray(value).tobytes()
    # Dynamic shape: a byte with the number of axes and log2 of the axis size's width, the axes.
    width = int(np.searchsorted([1 << 8, 1 << 16, 1 << 32], max(value.shape), side="right"))
    axes = np.array(value.shape, f"u{1 << width}").tobytes()
    return bytes([value.ndim << 2 | width]) + axes + np.ascontiguousarray(value).tobytes()

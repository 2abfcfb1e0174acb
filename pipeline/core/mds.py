"""MDS shards and indexes, written and read directly: bytes in, bytes out, no clock, no state.

mosaicml-streaming's own writer publishes its index once, at the end, and in place; a kill before
that loses everything. Here a shard is a value: `encode_shard` returns its bytes and its index
entry, and the caller commits both. Layout: streaming 0.13, format version 2; the library is the
oracle in tests/pipeline/core/test_mds.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

VALUE_DTYPES = {"uint8": 8, "int8": 9, "float16": 18, "int32": 33, "float32": 34, "int64": 65}


def encode_shard(
    columns: Mapping[str, str],
    samples: Iterable[Mapping[str, Any]],
    basename: str,
    hashes: Iterable[str] = (),
    compression: str | None = None,
) -> tuple[bytes, dict[str, Any]]:
    """One MDS shard file.

    Args:
        columns: name -> encoding: "str", "bytes", "int", "ndarray:DTYPE" (shape stored per sample)
            or "ndarray:DTYPE:D1,D2" (fixed shape, no header).
        samples: dicts with exactly these columns; at least one.
        basename: the uncompressed file's name as the index will give it.
        hashes: for readers that check (`validate_hash`), e.g. "sha1", "xxh3_64".
        compression: as streaming names it, e.g. "zstd" or "zstd:7".

    Returns:
        The bytes of the file to store, whose name is `stored(entry)["basename"]`, and its entry for
        `index`.

    Raises:
        ValueError: no samples, a value that does not fit its column, a shard over 4 GiB, or an
            unknown (or, as gz, irreproducible) compression or hash.
    """
    check_options(hashes, compression)
    names = sorted(columns)
    config = {
        "column_encodings": [columns[name] for name in names],
        "column_names": names,
        "column_sizes": [fixed_size(columns[name]) for name in names],
        "compression": compression,
        "format": "mds",
        "hashes": sorted(hashes),
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
    entry = {**config, "samples": len(bodies), "raw_data": _facts(data, basename, hashes)}
    if compression is None:
        return data, {**entry, "zip_data": None}
    from streaming.base.compression import compress, get_compression_extension

    packed = compress(compression, data)
    name = f"{basename}.{get_compression_extension(compression)}"
    return packed, {**entry, "zip_data": _facts(packed, name, hashes)}


def stored(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the index says of the file that is there: the compressed one, or the shard itself."""
    return entry["zip_data"] or entry["raw_data"]


def unpack(data: bytes, entry: Mapping[str, Any]) -> bytes:
    """The shard's own bytes out of those of its stored file."""
    if entry["compression"] is None:
        return data
    from streaming.base.compression import decompress

    return decompress(entry["compression"], data)


def check_options(hashes: Iterable[str], compression: str | None) -> None:
    """Raises ValueError for what streaming does not know, or what is not reproducible."""
    if not hashes and compression is None:
        return
    # Imported on use: it takes seconds.
    from streaming.base.compression import get_compressions, is_compression
    from streaming.base.hashing import get_hashes, is_hash

    for name in hashes:
        if not is_hash(name):
            raise ValueError(f"hash {name!r}: streaming knows {', '.join(sorted(get_hashes()))}")
    if compression is not None and not is_compression(compression):
        known = sorted({name.split(":")[0] for name in get_compressions()} - {"gz"})
        raise ValueError(f"compression {compression!r}: use {', '.join(known)}, or NAME:LEVEL")
    if compression is not None and compression.split(":")[0] == "gz":
        raise ValueError("compression 'gz' stamps the time into the file; use zstd")


def _facts(data: bytes, basename: str, hashes: Iterable[str]) -> dict[str, Any]:
    found = {}
    for name in sorted(hashes):
        from streaming.base.hashing import get_hash

        found[name] = get_hash(name, data)
    return {"basename": basename, "bytes": len(data), "hashes": found}


def decode_shard(
    data: bytes, only: Collection[str] | None = None
) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """A shard's header and its samples, one at a time; arrays are views of the shard's bytes.

    Args:
        only: names of the columns to decode, where others may be in encodings that are not ours.

    Raises:
        ValueError: these are no bytes of an MDS shard; from the iterator where a sample is broken.
    """
    config, offsets = read_header(data)
    lists = [config[f"column_{part}"] for part in ("names", "encodings", "sizes")]
    wanted = [only is None or name in only for name in lists[0]]
    if any(w and fixed_size(e) != s for w, e, s in zip(wanted, *lists[1:], strict=True)):
        raise ValueError("its header's column sizes do not fit their encodings")
    view = memoryview(data)
    pairs = itertools.pairwise(offsets)
    return config, (_decode_sample(config, wanted, view[a:b]) for a, b in pairs)


def read_header(data: bytes | memoryview) -> tuple[dict[str, Any], np.ndarray]:
    """A shard's header, and where its samples begin and the last one ends: int64 (samples + 1,).

    Raises:
        ValueError: these are no bytes of an MDS shard.
    """
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes are no MDS shard")
    count = int.from_bytes(data[:4], "little")
    start = 4 + 4 * (count + 1)
    if len(data) < start:
        raise ValueError(f"cut off in the offsets of its {count} samples")
    offsets = np.frombuffer(data, np.uint32, count + 1, offset=4).astype(np.int64)
    if offsets[0] < start or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
        raise ValueError("its offsets do not fit its size")
    try:
        config = json.loads(bytes(data[start : offsets[0]]))
        lists = [config[f"column_{part}"] for part in ("names", "encodings", "sizes")]
        fits = config["format"] == "mds" and config["version"] == 2
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("its header cannot be read") from error
    if not fits or any(type(part) is not list or len(part) != len(lists[0]) for part in lists):
        raise ValueError("its header is not that of an MDS shard of version 2")
    return config, offsets


def require_header(data: bytes | memoryview, entry: Mapping[str, Any]) -> None:
    """Raises ValueError where a shard's own header is not what the index says of it."""
    config, offsets = read_header(data)
    if len(offsets) - 1 != entry["samples"]:
        raise ValueError(f"holds {len(offsets) - 1} samples, the index says {entry['samples']}")
    for key in ("column_names", "column_encodings", "column_sizes"):
        if config[key] != entry[key]:
            raise ValueError(f"holds {key} {config[key]}, the index says {entry[key]}")


class _File(BaseModel):
    basename: str
    bytes: Annotated[int, Field(ge=0)]
    hashes: dict[str, str]


class _Entry(BaseModel):
    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[int | None]
    compression: str | None
    format: Literal["mds"]
    hashes: list[str]
    raw_data: _File
    samples: Annotated[int, Field(ge=1)]
    version: Literal[2]
    zip_data: _File | None


class _Input(BaseModel):
    shard: str
    split: str
    keys: str = ""  # older versions have none


class _Index(BaseModel):
    version: Literal[2]
    shards: list[_Entry]
    inputs: list[_Input] = []


def parse_index(data: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The shard entries of an index, and our "inputs" beside them, empty where there are none.

    Raises:
        ValueError: it is not the index of an MDS dataset.
    """
    record = json.loads(data)
    _Index.model_validate(record, strict=True)
    for entry in record["shards"]:
        lists = [entry[f"column_{part}"] for part in ("names", "encodings", "sizes")]
        if len({*map(len, lists)}) > 1:
            raise ValueError("names, encodings and sizes of a shard's columns differ in number")
        if (entry["compression"] is None) != (entry["zip_data"] is None):
            raise ValueError("a shard's compression does not fit its zip_data")
    return record["shards"], record.get("inputs", [])


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


def _decode_sample(config: dict[str, Any], wanted: list[bool], body: memoryview) -> dict[str, Any]:
    sizes, start = [], 0
    for size in config["column_sizes"]:
        if size is None:
            size = int.from_bytes(body[start : start + 4], "little")
            start += 4
        sizes.append(size)
    if start + sum(sizes) != len(body):
        raise ValueError(f"a sample of {len(body)} bytes whose values take {start + sum(sizes)}")
    sample = {}
    for name, encoding, size, take in zip(
        config["column_names"], config["column_encodings"], sizes, wanted, strict=True
    ):
        if take:
            sample[name] = _decode_value(encoding, body[start : start + size])
        start += size
    return sample


def _decode_value(encoding: str, value: memoryview) -> Any:
    kind, *args = encoding.split(":")
    if kind == "str":
        return str(value, "utf-8")
    if kind == "bytes":
        return bytes(value)
    if kind == "int":
        return int.from_bytes(value, "little", signed=True)
    if len(args) == 2:
        shape = [int(side) for side in args[1].split(",")]
        return np.frombuffer(value, args[0]).reshape(shape)
    if not len(value):
        raise ValueError("an array of no bytes")
    axes, width = value[0] >> 2, 1 << (value[0] & 3)
    start = 1 + axes * width
    shape = np.frombuffer(value[1:start], f"u{width}").astype(np.int64)
    return np.frombuffer(value[start:], args[0]).reshape(shape)

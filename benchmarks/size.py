"""Bytes a sample of the cache, on a mix with the paper's proportions and caption lengths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.rows import Row
from pipeline.core.mds import encode_shard
from pipeline.core.tables import to_parquet
from pipeline.core.tokens import quantise
from pipeline.stages.text import columns

#: Dataset -> (share of the mix, tokens a caption, pictures a caption).
MIX = {
    "cc12m": (11, 20, 1),
    "sa1b": (11, 77, 1),
    "journeydb": (4, 50, 1),
    "diffusiondb": (11, 60, 7),
}
OFFICIAL = 77 * 1024 * 2 + 4 * 32 * 32 * 2 + 4 * 64 * 64 * 2  # 198,656, its caption not counted
SAMPLES = 700  # of a shard here; the cost of a shard's header is below a byte a sample
WANTED = {"float16": (0.60, 0.45), "int8": (0.42, 0.26)}


def rows() -> Iterator[Row]:
    rng = np.random.default_rng(0)
    latents = {
        side: _bytes({"key": "str", "latent": f"ndarray:float16:4,{side},{side}"}, _pictures(side))
        for side in (32, 64)
    }
    keys = _keys(range(SAMPLES))
    for dtype, (whole, read) in WANTED.items():
        total = at_256 = weights = 0.0
        for share, tokens, repeats in MIX.values():
            text = _text(rng, dtype, tokens, SAMPLES // repeats)
            join = _keys(number // repeats for number in range(SAMPLES))
            total += share * (sum(latents.values()) + 2 * keys + text + join)
            at_256 += share * (latents[32] + keys + text + join)
            weights += share
        total, at_256 = (count / weights / SAMPLES for count in (total, at_256))
        yield Row(
            f"bytes a sample on disk, trimmed, {dtype}, against the official {OFFICIAL:,}",
            f"{total:,.0f}, {total / OFFICIAL:.1%}",
            f"at most {whole:.0%}",
            total <= whole * OFFICIAL,
        )
        yield Row(
            f"bytes a sample read when training at 256 px, trimmed, {dtype}",
            f"{at_256:,.0f}, {at_256 / OFFICIAL:.1%}",
            f"at most {read:.0%}",
            at_256 <= read * OFFICIAL,
        )


def _pictures(side: int) -> Iterator[dict]:
    latent = np.zeros((4, side, side), np.float16)
    for number in range(SAMPLES):
        yield {"key": f"00000{number:04d}", "latent": latent}


def _text(rng: np.random.Generator, dtype: str, tokens: int, distinct: int) -> int:
    samples = []
    for number in range(distinct):
        vectors = rng.normal(size=(tokens, 1024)).astype(np.float16)
        sample = {"caption": f"{number:05d} " + "word " * (tokens - 3), "tokens": vectors}
        if dtype == "int8":
            sample["tokens"], sample["scales"] = quantise(vectors)
        samples.append(sample)
    return _bytes(columns(dtype), samples)


def _bytes(kinds: dict[str, str], samples) -> int:
    return len(encode_shard(kinds, samples, "x.mds")[0])


def _keys(rows) -> int:
    import pyarrow as pa

    names = [f"00000{number:04d}" for number in range(SAMPLES)]
    return len(to_parquet(pa.table({"key": names, "row": pa.array(list(rows), pa.int32())})))

"""Token vectors of one shard: each distinct caption once, full or trimmed, float16 or int8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pipeline.core.stopwatch import Stopwatch
from pipeline.core.tokens import quantise


class TextEncoder(Protocol):
    """What is asked of every text encoder of pipeline.encoders."""

    def encode(self, captions: list[str]) -> tuple[Any, Any]: ...


@dataclass
class Made:
    """One shard's captions."""

    samples: list[dict[str, Any]] = field(default_factory=list)  # caption, tokens[, scales]
    counters: Counter[str] = field(default_factory=Counter)


class TextMaker:
    """Made of one text encoder, which `encoder` gives when the first batch is ready."""

    def __init__(
        self, encoder: Callable[[], TextEncoder], batch_size: int, watch: Stopwatch
    ) -> None:
        self.encoder = encoder
        self.batch_size = batch_size
        self.watch = watch

    def make(self, captions: list[str], mode: str, dtype: str) -> Made:
        """Token vectors of distinct captions, in their order.

        Args:
            mode: "full", all rows of the encoder's length, or "trimmed", rows up to end-of-text.
            dtype: "float16" or "int8".

        Raises:
            ValueError: the encoder gave a vector that is not finite.
        """
        made = Made()
        for start in range(0, len(captions), self.batch_size):
            part = captions[start : start + self.batch_size]
            encoder = self.encoder()
            with self.watch("text"):
                tokens, lengths = encoder.encode(part)
            full = tokens.shape[1]
            made.counters["captions_at_full_length"] += int((lengths == full).sum())
            for caption, rows, length in zip(part, tokens.numpy(), lengths.tolist(), strict=True):
                kept = rows[: full if mode == "full" else length]
                if not np.isfinite(kept).all():
                    raise ValueError(f"no finite token vectors for {caption[:80]!r}")
                if dtype == "int8":
                    quantised, scales = quantise(kept)
                    made.samples.append({"caption": caption, "tokens": quantised, "scales": scales})
                else:
                    made.samples.append({"caption": caption, "tokens": kept.astype(dtype)})
        made.counters["distinct_captions"] = len(captions)
        return made


def columns(dtype: str) -> dict[str, str]:
    """MDS columns of a text group."""
    if dtype == "int8":
        return {"caption": "str", "tokens": "ndarray:int8", "scales": "ndarray:float16"}
    return {"caption": "str", "tokens": f"ndarray:{dtype}"}

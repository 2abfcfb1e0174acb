"""Captioning in process: batches against one picture at a time, the same model and pictures."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.rows import REPEATS, Row, seconds
from captioning import Captioner, load
from tests.captioning.helpers.small_llava import save_llava

PICTURES = 64
BATCH = 16
TOKENS = 32
HIDDEN, LAYERS = 256, 4  # small, yet its matrices are no trifle beside Python


def rows() -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            yield _batched(save_llava(Path(name), hidden=HIDDEN, layers=LAYERS))
    finally:
        torch.set_num_threads(threads)


def _batched(folder: Path) -> Row:
    images = _pictures()
    one, many = (
        load(str(folder), max_tokens=TOKENS, prompt="long,short", batch_size=size)
        for size in (1, BATCH)
    )
    assert one(images[:4]) == many(images[:4])  # loads both
    ratios, rates = [], []
    for _ in range(REPEATS):  # interleaved: what else the machine does falls on both
        alone = _spent(one, images)
        batched = _spent(many, images)
        ratios.append(alone / batched)
        rates.append(2 * len(images) / batched)
    ratio = statistics.median(ratios)
    return Row(
        f"captions of {len(images)} pictures by a small LLaVA (width {HIDDEN}, {LAYERS} layers), "
        f"two prompts, {TOKENS} tokens, one core: batches of {BATCH} against one by one",
        f"{ratio:.2f}× ({min(ratios):.2f}–{max(ratios):.2f}; "
        f"{statistics.median(rates):.1f} captions/s)",
        "at least 1.5×",
        ratio >= 1.5,
    )


def _spent(captioner: Captioner, images: list[Image.Image]) -> float:
    return seconds(lambda: captioner(images))


def _pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)) for _ in range(PICTURES)
    ]

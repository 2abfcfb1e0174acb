"""Encoding: is the encoder kept busy, what does a sample take, and against the official loop."""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.rows import Row, median, seconds
from pipeline.core.catalog import Catalog
from pipeline.core.images import read_pixels
from pipeline.core.samples import ImageRef, ImageSample, InputShard
from pipeline.core.store import Store
from pipeline.engine.plan import plan
from pipeline.engine.pool import Options
from pipeline.engine.report import Report
from pipeline.engine.runner import run
from pipeline.sources.openmoji import BACKGROUNDS, STARTER, caption, render
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings
from pipeline.stages.encode_worker import EncodeWorker
from pipeline.stages.images import write_images

BATCH = 16
PICTURES = 256  # of the comparison with the official loop
WORKERS = 2
ENCODER_S = 0.020  # a batch of the stand-in for a GPU


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        yield _busy(Path(name, "busy"))
        yield from _against_official(Path(name))


def _busy(root: Path) -> Row:
    """An encoder that takes a fixed time a batch, with decoding beside it, two shards in hand."""
    store = Store(root)
    shards, each = 24, 20 * BATCH
    picture = render("avocado", 160, BACKGROUNDS["blue"])
    for number in range(shards):
        pictures = [_sample(f"{number:05d}{i:04d}", picture, 160, 160) for i in range(each)]
        shard = InputShard(f"{number:05d}", "train")
        write_images(store, "openmoji/images", shard, {}, pictures, 0.0)
    settings = EncodeSettings(
        "tiny4", "tiny-clip", (128,), text="trimmed", captions="alt", batch_size=BATCH
    )
    stage = Encode("openmoji", settings)
    catalog = Catalog(store)
    group = stage.latents_group(128)
    jobs = list(plan(stage, catalog).jobs(stage, catalog))
    for job in jobs:  # pictures only: the stand-in has no text
        del job.groups[stage.text_group()]
    encoder = _StandIn(128 // 8)
    worker = EncodeWorker(stage, store, threads=2)
    worker.vae = encoder
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        made = sum(len(found) for found in pool.map(worker, jobs))
    rate = shards * each / (time.perf_counter() - started)
    assert made == shards
    assert group in jobs[0].groups
    busy = encoder.busy * rate / (shards * each)
    pixels = np.zeros((BATCH, 128, 128, 3), np.uint8)
    own = BATCH / median(lambda: seconds(lambda: encoder.moments(pixels)), 20)
    return Row(
        f"encoder that takes {ENCODER_S * 1000:.0f} ms a batch, {shards} shards of {each} "
        "pictures, read to written, against the encoder alone",
        f"{rate / own:.1%} of its rate ({rate:.0f} samples/s; it is busy {busy:.1%} of the time)",
        "at least 95 %",
        rate / own >= 0.95,
    )


class _StandIn:
    """Takes as long as a GPU would, and none of the CPU."""

    def __init__(self, side: int) -> None:
        self.side, self.busy = side, 0.0

    def moments(self, pixels: np.ndarray, exact: bool = False) -> torch.Tensor:
        started = time.perf_counter()
        time.sleep(ENCODER_S * len(pixels) / BATCH)
        self.busy += time.perf_counter() - started
        return torch.zeros(len(pixels), 8, self.side, self.side)


def _against_official(root: Path) -> Iterator[Row]:
    """The same encoders and pictures through `pipeline run encode` and the official loop."""
    store = Store(root / "pictures")
    data = _photographs()
    texts = [caption(STARTER[i % 64], "blue") for i in range(PICTURES)]
    shards = PICTURES // BATCH
    for number in range(shards):
        part = range(number * BATCH, (number + 1) * BATCH)
        pictures = [
            _sample(f"{number:05d}{i:04d}", data[i % len(data)], 2250, 1500, texts[i]) for i in part
        ]
        shard = InputShard(f"{number:05d}", "train")
        write_images(store, "openmoji/images", shard, {}, pictures, 0.0)
    for resolutions in ((64, 128), (128, 256)):
        settings = EncodeSettings(
            "tiny4", "tiny-clip", resolutions, text="full", captions="alt", batch_size=BATCH
        )
        ours, official, shares = [], [], []
        for number in range(3):
            target = root / f"{resolutions[0]}-{number}"
            official.append(_official(store, settings, texts, target / "official"))
            rate, share = _ours(settings, store, target / "ours")
            ours.append(rate)
            shares.append(share)
        ratios = [a / b for a, b in zip(ours, official, strict=True)]
        ratio = statistics.median(ratios)
        yield Row(
            f"2250×1500 JPEGs to {resolutions[0]} and {resolutions[1]} px with tiny4 and "
            "tiny-clip, 2 cores, weights loaded, against the official precompute loop",
            f"{ratio:.2f}× ({min(ratios):.2f}–{max(ratios):.2f}; {statistics.median(ours):.1f} "
            f"against {statistics.median(official):.1f} samples/s)",
            "at least 1.5×",
            ratio >= 1.5,
        )
        share = statistics.median(shares)
        yield Row(
            f"the same: wall time over half the sum of its CPU work ({resolutions[1]} px)",
            f"{share:.2f}×",
            "at most 1.15×",
            share <= 1.15,
        )


def _ours(settings: EncodeSettings, pictures: Store, target: Path) -> tuple[float, float]:
    """(samples a second once each worker has made a shard, and so has loaded its weights; wall time
    over half the CPU work in that time)."""
    target.mkdir(parents=True)
    os.symlink(Path(pictures.root, "openmoji"), target / "openmoji")
    moments: list[tuple[float, int, int]] = []  # time, samples, milliseconds of work

    def progress(report: Report) -> None:
        if report.finished >= WORKERS and (not moments or report.samples > moments[-1][1]):
            moments.append((time.perf_counter(), report.samples, sum(report.spent().values())))

    run(Encode("openmoji", settings), str(target), Options(workers=WORKERS), progress)
    for group in Encode("openmoji", settings).groups():
        for path in Path(target, group, "commits").glob("*.json"):
            path.unlink()  # the pictures' folder is shared: the next repeat begins anew
    (began, before, spent), (ended, after, all_spent) = moments[0], moments[-1]
    wall = ended - began
    return (after - before) / wall, wall / ((all_spent - spent) / 1000 / WORKERS)


def _official(store: Store, settings: EncodeSettings, texts: list[str], out: Path) -> float:
    """Samples a second of what the official precompute does: two loader processes decode with
    Pillow and resize twice, one process encodes batches of 32 and writes MDS. Its encoders are
    ours, loaded beforehand."""
    from streaming import MDSWriter

    from pipeline.encoders import load_text, load_vae
    from pipeline.stages.images import read_images

    torch.set_num_threads(2)
    vae, text = load_vae(settings.vae), load_text(settings.text_encoder)
    catalog = Catalog(store)
    from pipeline.core.commits import read_commit

    data = []
    for shard in catalog.heads("openmoji/images"):
        commit = read_commit(store, "openmoji/images", shard)
        assert commit is not None
        data += [image.data for image in read_images(store, "openmoji/images", commit)]
    dataset = _Official(data, texts, settings.resolutions)
    loader = torch.utils.data.DataLoader(dataset, 32, num_workers=2, prefetch_factor=2)
    columns: dict[str, str] = {"caption": "str", "caption_latents": "bytes"}
    columns |= {f"latents_{r}": "bytes" for r in settings.resolutions}
    started = time.perf_counter()
    with MDSWriter(columns=columns, out=str(out), size_limit=1 << 28) as writer:
        for batch in loader:
            latents = []
            for pixels in batch["pixels"]:
                moments = vae.moments(pixels.numpy())
                mean, log_variance = moments.chunk(2, 1)
                sample = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
                latents.append((sample * vae.facts.scale).half().numpy())
            tokens = text.encode(batch["caption"])[0].half().numpy()
            for number, one in enumerate(batch["caption"]):
                row: dict[str, Any] = {"caption": one}
                row["caption_latents"] = tokens[number].tobytes()
                for resolution, latent in zip(settings.resolutions, latents, strict=True):
                    row[f"latents_{resolution}"] = latent[number].tobytes()
                writer.write(row)
    spent = time.perf_counter() - started
    torch.set_num_threads(1)
    return len(data) / spent


class _Official(torch.utils.data.Dataset):
    def __init__(self, data: list[bytes], texts: list[str], sides: tuple[int, ...]) -> None:
        self.data, self.texts, self.sides = data, texts, sides

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.open(io.BytesIO(self.data[index])).convert("RGB")
        pixels = []
        for side in self.sides:
            scale = side / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            small = image.resize(size, Image.Resampling.BICUBIC)
            left, top = (small.width - side) // 2, (small.height - side) // 2
            pixels.append(np.asarray(small.crop((left, top, left + side, top + side))).copy())
        return {"pixels": pixels, "caption": self.texts[index]}


def _photographs() -> list[bytes]:
    """JPEGs of SA1B's size and about its bytes (830 KB): emoji over noise."""
    made = []
    rng = np.random.default_rng(0)
    for glyph in STARTER[:6]:
        emoji = Image.fromarray(read_pixels(render(glyph, 1500, BACKGROUNDS["grey"])))
        canvas = Image.new("RGB", (2250, 1500), (120, 150, 110))
        canvas.paste(emoji, (375, 0))
        noise = rng.normal(0, 9, (1500, 2250, 3))
        pixels = (np.asarray(canvas) + noise).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def _sample(key: str, data: bytes, width: int, height: int, text: str = "x") -> ImageSample:
    ending = "png" if data[:4] == b"\x89PNG" else "jpg"
    ref = ImageRef(key, "bench:", text)
    return ImageSample(ref, data, ending, width, height, width, height)

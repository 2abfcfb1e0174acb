"""The training loader against a plain one over the official layout, and what each reads."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from streaming import StreamingDataset
from torch.utils.data import DataLoader

from benchmarks.rows import REPEATS, Row
from pipeline.core import layout, mds
from pipeline.core.commits import write_shard
from pipeline.core.groups import publish
from pipeline.core.samples import InputShard
from pipeline.core.store import Store, fingerprint
from pipeline.core.tables import to_parquet
from pipeline.encoders import text_facts, vae_facts
from training.config.load import resolve
from training.config.plan import TrainingPlan
from training.data.loader import make_dataset, make_loader
from training.run.preflight import check

BATCH, WORKERS = 256, 2
SHARDS, SAMPLES = 8, 640  # of each shard
VAE, ENCODER = "sdxl", "dfn5b-h14"
#: Captions' tokens and how many of 37 samples have them: the paper's mix (facts/method.md).
LENGTHS = ((20, 11), (77, 11), (50, 4), (60, 11))


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for latents in ("mean", "moments"):
            plan = write(Path(name), latents)
            yield from _compare(plan, Path(name, "official"), latents)


def _compare(plan: TrainingPlan, official: Path, latents: str) -> Iterator[Row]:
    dataset = make_dataset(plan, "s")
    ours = make_loader(dataset, WORKERS, trimmed=True)
    plain = DataLoader(
        Official(local=str(official), batch_size=BATCH, shuffle=True),
        batch_size=BATCH,
        num_workers=WORKERS,
        prefetch_factor=4,
        persistent_workers=True,
        drop_last=True,
    )
    for loader in (ours, plain):
        _rate(loader)  # starts the workers, fills the page cache
    pairs = [(_rate(ours), _rate(plain)) for _ in range(REPEATS)]
    mine, its = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    yield Row(
        f"loader at 256 px over column groups (latents: {latents}; trimmed fp16 text) against a "
        f"plain StreamingDataset + np.frombuffer over the official layout; batch {BATCH}, "
        f"{WORKERS} workers, warm cache, every batch copied once",
        f"{statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f}; "
        f"{mine:,.0f} against {its:,.0f} samples/s)",
        "at least 2×" if latents == "mean" else "",
        latents != "mean" or statistics.median(ratios) >= 2,
    )
    (source,) = plan.data["s"]
    read = (source.latent_bytes + source.text_bytes) / source.samples
    whole = _bytes(official) / source.samples
    yield Row(
        f"bytes read a sample at 256 px (latents: {latents}), fp16 text, the mix's "
        "lengths, no caption repeated",
        f"{read:,.0f}, {read / whole:.0%} of the official layout's {whole:,.0f}",
        "",
    )


class Official(StreamingDataset):
    """What the official trainer reads: all four columns, of which it uses two."""

    def __getitem__(self, at: Any) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(at)
        text = np.frombuffer(sample["caption_latents"], np.float16).copy()
        latent = np.frombuffer(sample["latents_256"], np.float16).copy()
        return {
            "caption_latents": torch.from_numpy(text).reshape(1, 77, 1024),
            "image_latents": torch.from_numpy(latent).reshape(-1, 32, 32),
            "drop_caption_mask": torch.tensor(float(np.random.rand() >= 0.1)),
        }


def _rate(loader: Iterable[dict[str, torch.Tensor]]) -> float:
    """Samples a second over an epoch, from its first batch on: before that either loader plans the
    epoch. Every tensor is copied once, as to a GPU."""
    count, began = 0, 0.0
    for batch in loader:
        for name, value in batch.items():
            if name not in _COPIES or _COPIES[name].numel() < value.numel():
                _COPIES[name] = torch.zeros(value.numel(), dtype=value.dtype)
            _COPIES[name][: value.numel()].copy_(value.reshape(-1))
        count += BATCH if began else 0
        began = began or time.perf_counter()
    return count / (time.perf_counter() - began)


_COPIES: dict[str, torch.Tensor] = {}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.mds"))


def write(root: Path, latents: str) -> TrainingPlan:
    """Column groups and, once, the official layout with the same samples."""
    store = Store(root / latents)
    vae, encoder = vae_facts(VAE), text_facts(ENCODER)
    depth = vae.channels * (2 if latents == "moments" else 1)
    latents_group = layout.latents_group("mix", VAE, 256, latents)
    text_group = layout.text_group("mix", ENCODER, "alt", "trimmed")
    entries = []
    for number in range(SHARDS):
        rng = np.random.default_rng(number)
        shard = InputShard(f"{number:05d}", "train")
        keys = [f"{shard.id}{i:04d}" for i in range(SAMPLES)]
        pool = np.concatenate([np.full(share, length) for length, share in LENGTHS])
        counts = rng.choice(pool, SAMPLES)
        text = rng.standard_normal((SAMPLES, 77, 1024), np.float32).astype(np.float16)
        small = rng.standard_normal((SAMPLES, depth, 32, 32), np.float32).astype(np.float16)
        captions = [f"caption {key}" for key in keys]
        rows = pa.table({"key": keys, "row": pa.array(range(SAMPLES), pa.int32())})
        _shard(
            store,
            latents_group,
            shard,
            {"vae": vae.model_dump(), "resolution": 256, "latents": latents},
            {"key": "str", "latent": f"ndarray:float16:{depth},32,32"},
            [{"key": k, "latent": v} for k, v in zip(keys, small, strict=True)],
            rows,
        )
        _shard(
            store,
            text_group,
            shard,
            {"text_encoder": encoder.model_dump(), "text": "trimmed", "captions": "alt"},
            {"caption": "str", "tokens": "ndarray:float16"},
            [
                {"caption": c, "tokens": t[:n]}
                for c, t, n in zip(captions, text, counts, strict=True)
            ],
            rows,
        )
        if not (root / "official" / "index.json").exists():
            large = rng.standard_normal((4, 64, 64), np.float32).astype(np.float16).tobytes()
            columns = ("caption_latents", "latents_256", "latents_512")
            data, entry = mds.encode_shard(
                {"caption": "str"} | dict.fromkeys(columns, "bytes"),
                [
                    {
                        "caption": c,
                        "caption_latents": t.tobytes(),
                        "latents_256": v[:4].tobytes(),
                        "latents_512": large,
                    }
                    for c, t, v in zip(captions, text, small, strict=True)
                ],
                f"shard.{number:05d}.mds",
            )
            Store(root / "official").write(f"shard.{number:05d}.mds", data)
            entries.append(entry)
    if entries:
        Store(root / "official").write_json("index.json", {"version": 2, "shards": entries})
    publish(store, latents_group)
    publish(store, text_group)
    return check(
        resolve(
            {
                "name": "bench",
                "folder": str(root / "run"),
                "data": {
                    "root": store.root,
                    "sources": ["mix"],
                    "vae": VAE,
                    "text_encoder": ENCODER,
                    "text": "trimmed",
                    "latents": latents,
                },
                "model": {"arch": "MicroDiT_Tiny_2"},
                "stages": {"s": {"steps": 1, "resolution": 256, "batch_size": BATCH, "lr": 1e-3}},
            }
        )
    )


def _shard(
    store: Store,
    group: str,
    shard: InputShard,
    inputs: dict[str, Any],
    columns: dict[str, str],
    samples: list[dict[str, Any]],
    rows: pa.Table,
) -> None:
    inputs = {**inputs, "shard": shard.id}
    stem = f"{shard.id}-{fingerprint(inputs)}"
    data, entry = mds.encode_shard(columns, samples, f"{stem}.mds")
    files = {f"{stem}.mds": data, f"{stem}.parquet": to_parquet(rows)}
    write_shard(store, group, shard, inputs, files, rows["key"].to_pylist(), [], entry)

"""What the stored form of captions does to a trained model: full, trimmed, and trimmed int8."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.rows import Row

STEPS = 250  # of each of the demo's two stages
SEEDS = (18, 19)
#: What is compared -> (options of `pipeline run encode`, settings of the trainer).
FORMS: dict[str, tuple[list[str], list[str]]] = {
    "trimmed": ([], []),
    "trimmed int8": (["--text-dtype", "int8"], ["data.text_dtype=int8"]),
    "full": (["--text", "full"], ["data.text=full"]),
}


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        root = Path(name, "root")
        pipeline = ["pipeline", "run"]
        _run([*pipeline, "all", "--config", "yamls/data/openmoji.yaml", "--root", str(root)])
        losses: dict[str, list[float]] = {}
        for form, (options, settings) in FORMS.items():
            if options:
                config = ["--config", "yamls/data/openmoji.yaml"]
                _run([*pipeline, "encode", *config, "--root", str(root), *options])
            losses[form] = [
                _train(root, Path(name, f"{form}-{seed}"), settings, seed) for seed in SEEDS
            ]
    base = losses["trimmed"]
    spread = abs(base[0] - base[1]) / statistics.mean(base)
    for form, found in losses.items():
        # With the same seed everything else is the same: noise, order, masks, first weights.
        changes = [b / a - 1 for a, b in zip(base, found, strict=True)]
        shown = ", ".join(f"{loss:.4f}" for loss in found)
        change = "" if form == "trimmed" else f"; {', '.join(f'{c:+.2%}' for c in changes)}"
        yield Row(
            f"held-out loss of the demo's network after {2 * STEPS} steps, captions stored "
            f"{form}; seeds {SEEDS[0]}, {SEEDS[1]}",
            f"{shown}{change} (seeds differ by {spread:.2%})",
            "",
        )


def _train(root: Path, folder: Path, settings: list[str], seed: int) -> float:
    """The mean held-out loss of the averaged weights over all noise bins, at the end."""
    steps = [f"stages.{stage}.steps={STEPS}" for stage in ("masked", "full")]
    own = [f"data.root={root}", f"folder={folder}", f"seed={seed}", *steps, *settings]
    fixed = [f"evaluate.every={STEPS}", "evaluate.samples=64", "samples.every=0"]
    _run([sys.executable, "training/train.py", "yamls/demo.yaml", *own, *fixed])
    lines = (folder / "full/metrics.jsonl").read_text().splitlines()
    shutil.rmtree(folder)
    return json.loads(lines[-1])["eval/ema/mean"]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

"""Twenty losses of a small run, as they were when they were written down: a refactor repeats them.

`python -m tests.training.run.test_golden` writes them anew. A change that means to alter them says
so in its commit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.training.helpers.groups import make_encoders, make_source, settings
from training.config.load import resolve
from training.run import trainer
from training.run.preflight import check

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own

GOLDEN = Path(__file__).with_name("golden.json")
STAGES: dict[str, Any] = {
    "masked": {"steps": 12, "mask": "deferred", "mask_ratio": 0.5, "warmup": 3},
    "full": {"steps": 8, "schedule": "cosine", "clip": 0.5, "keep_moments": True},
}


def losses(folder: Path) -> list[float]:
    encoders = make_encoders(folder / "encoders")
    make_source(folder / "data", encoders)
    raw = settings(folder / "data", encoders, folder / "run")
    trainer.run(check(resolve({**raw, "precision": "fp32", "stages": STAGES})))
    lines = [
        line
        for name in STAGES
        for line in (folder / "run" / name / "metrics.jsonl").read_text().splitlines()
    ]
    return [json.loads(line)["train/loss"] for line in lines]


def test_losses_are_those_written_down(tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())
    assert len(expected) == 20
    # Threads and processors add in another order; routing has no tie here that it would decide.
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        GOLDEN.write_text(json.dumps(losses(Path(name)), indent=1) + "\n")

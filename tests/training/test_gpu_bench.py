"""The GPU benchmark runs, on this processor and a tiny network, with nothing but torch."""

import dataclasses
import subprocess
import sys

import pytest

from benchmarks import gpu
from training.network.config import MODELS, DiTConfig

TINY = DiTConfig(
    width=64, depth=2, head_dim=16, multiple_of=32, mixer_width=48, mixer_depth=1, caption_width=16
)


def test_every_stage_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(gpu, "REPEATS", 1)
    stages = {
        name: (side, ratio, 2, wanted) for name, (side, ratio, _, wanted) in gpu.STAGES.items()
    }
    monkeypatch.setattr(gpu, "STAGES", stages)
    rows = list(gpu.rows("cpu", "tiny"))
    assert len(rows) == 2 * len(stages)
    assert all("pictures/s" in row.measured for row in rows)
    assert dataclasses.asdict(rows[0])["claim"].startswith("tiny, 256 px masked")


def test_nothing_but_torch_is_imported() -> None:
    code = (
        "import sys, benchmarks.gpu\n"
        "others = {'composer', 'streaming', 'diffusers', 'transformers', 'pydantic', 'ray'}\n"
        "print(sorted(others & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

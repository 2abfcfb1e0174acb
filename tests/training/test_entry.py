"""`python training/train.py` as a program: quick answers, and what dry_run prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkout import ROOT
from tests.training.helpers.groups import Encoders, changed, make_source
from training.config.settings import Config
from training.threads import share_cores

STARTUP_S = 2.0  # in which an error has to be out


def train(*arguments: str, cwd: Path = ROOT) -> tuple[subprocess.CompletedProcess[str], float]:
    """`python training/train.py …` and its seconds."""
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(ROOT / "training/train.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    return result, time.monotonic() - start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["yamls/1b.yaml", "data.root={tmp}"], "no shards at"),
        (
            ["yamls/demo.yaml", "stages.full.lrr=1"],
            'stages.full.lrr: unknown key; did you mean "lr"',
        ),
        (["yamls/nothing.yaml"], "yamls/nothing.yaml: No such file or directory"),
    ],
)
def test_mistakes_are_one_line_and_quick(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    # The best of three: the machine may be busy, and the limit is about what we import.
    runs = [train(*(a.format(tmp=tmp_path) for a in arguments)) for _ in range(3)]
    result, _ = runs[0]
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout
    assert min(seconds for _, seconds in runs) < STARTUP_S


def test_settings_are_checked_without_heavy_imports() -> None:
    program = (
        "import sys, training.train, training.generate\n"
        "print(sorted({'torch', 'composer', 'streaming', 'pyarrow'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"


def test_threads_wait_politely_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_dry_run_without_data(tmp_path: Path) -> None:
    result, _ = train("yamls/1b.yaml", "dry_run=true", f"data.root={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "parameters: 1,165,442,320" in result.stdout
    rows = [
        line.split() for line in result.stdout.splitlines() if line.startswith(("256-", "512-"))
    ]
    assert [row[3] for row in rows] == ["94.1", "238.1", "356.5", "1001"]  # GFLOP an image
    assert [row[4] for row in rows] == ["165,888", "165,888", "190,464", "190,464"]  # bytes
    assert "3.287e+20 FLOPs" in result.stdout
    assert f"not all there under {tmp_path}" in result.stdout
    resolved = yaml.safe_load(result.stdout.split("\nparameters:")[0])
    assert resolved["stages"]["512-full"]["lr"] == 8e-5  # every stage is shown completed
    assert Config.model_validate(resolved).stages["256-masked"].warmup == 2500


def test_dry_run_measures_data(tmp_path: Path, raw: dict[str, Any], encoders: Encoders) -> None:
    store = make_source(Path(raw["data"]["root"]), encoders)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    result, _ = train(str(path), "dry_run=true")
    assert result.returncode == 0, result.stderr
    assert "data: toy 40 samples of split train; bytes are measured" in result.stdout
    latents = sum(f.stat().st_size for f in Path(store.root).glob("toy/latents/**/0000[01]-*.mds"))
    text = sum(f.stat().st_size for f in Path(store.root).glob("toy/text/**/0000[01]-*.mds"))
    row = next(line for line in result.stdout.splitlines() if line.startswith("full "))
    assert row.split()[4] == f"{latents / 40 + text / 14:,.0f}"


def test_sizes_no_network_can_have(tmp_path: Path, raw: dict[str, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(changed(raw, "model.width", 40)))
    result, _ = train(str(path), "dry_run=true")
    assert result.returncode == 2
    assert result.stderr.startswith("train: model: width 40: choose a multiple of head_dim 16")

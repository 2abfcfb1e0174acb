"""Users' data outlives releases: what version 0.1.0 left on disk works as it did."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.core import layout
from pipeline.core.commits import read_commits
from pipeline.core.store import Store
from tests.pipeline.helpers.roots import mds_rows

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
BIN = Path(sys.executable).parent
WEIGHTS = CHECKOUT / "pipeline/encoders/weights"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(HERE / "0.1.0.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def earlier(archive: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(archive, tmp_path / "home")


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), "COLUMNS": "200"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def groups(folder: Path) -> dict[str, dict[str, Any]]:
    """Group -> what `pipeline status` counts of it."""
    shown = run(folder, BIN / "pipeline", "status", "--json")
    assert shown.returncode == 0, shown.stderr
    return {f"{row['source']}/{row['group']}": row for row in json.loads(shown.stdout)}


def test_stale_is_only_what_a_mend_concerns(earlier: Path) -> None:
    """One shard of `links` holds a picture with its place, one a picture with a colour profile."""
    found = groups(earlier)
    assert len(found) == 10
    assert not [name for name, row in found.items() if row["left"]]
    stale = {name: [*row["stale"].items()] for name, row in found.items() if row["stale"]}
    assert [*stale] == ["links/images", "links/latents/tiny4/64"]
    ((metadata, pictures),), ((colours, latents),) = stale.values()
    assert "metadata" in metadata
    assert "colours" in colours
    assert pictures == latents == 1


def test_verify_finds_nothing(earlier: Path) -> None:
    found = run(earlier, BIN / "pipeline", "verify")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_new_shards_are_the_old_ones(earlier: Path) -> None:
    """Pictures and captions to the byte; what networks computed, which every kind of processor
    rounds in its own way, to float16's last bits."""
    old, new = Store(earlier / "data"), Store(earlier / "again")
    for command in ("download", "caption", "encode"):
        made = run(
            earlier, BIN / "pipeline", "run", command, "--source", "openmoji", "--root", "again"
        )
        assert made.returncode == 0, made.stderr
    for group in (
        layout.images_group("openmoji"),
        layout.captions_group("openmoji", "colour"),
        layout.text_group("openmoji", "tiny-clip", "alt:0.9,colour:0.1", "trimmed"),
        layout.latents_group("openmoji", "tiny4", 64),
    ):
        before, after = read_commits(old, group), read_commits(new, group)
        assert before.keys() == after.keys()
        for shard, commit in before.items():
            assert after[shard].fingerprint == commit.fingerprint
            if commit.index is None:
                assert after[shard].content() == commit.content()
        if commit.index is not None:
            for row, own in zip(mds_rows(old, group), mds_rows(new, group), strict=True):
                assert row.keys() == own.keys()
                for column, value in row.items():
                    if isinstance(value, str):
                        assert own[column] == value
                    else:
                        np.testing.assert_allclose(own[column], value, rtol=4e-3, atol=4e-3)


@pytest.mark.slow
def test_a_stopped_run_goes_on(earlier: Path) -> None:
    """To the weights of the run that nobody stopped: the last bit on one kind of processor."""
    gone = run(
        earlier, sys.executable, CHECKOUT / "training/train.py", "yamls/run.yaml", "name=stopped"
    )
    assert gone.returncode == 0, gone.stderr
    for name in ("model.safetensors", "full/live.safetensors"):
        ours, theirs = (load_file(earlier / "runs" / r / name) for r in ("stopped", "finished"))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-5)
    lines = (earlier / "runs/stopped/full/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines if "train/loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_finished_run_is_finished_and_paints_the_same(earlier: Path) -> None:
    again = run(
        earlier, sys.executable, CHECKOUT / "training/train.py", "yamls/run.yaml", "name=finished"
    )
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout
    painted = run(
        earlier,
        *(sys.executable, "-m", "training.generate", "--checkpoint", "runs/finished"),
        *("--prompts", "avocado on a blue background", "--steps", "8", "--out", "again"),
    )
    assert painted.returncode == 0, painted.stderr
    name = "0000-avocado-on-a-blue-background.png"
    new, old = (np.asarray(Image.open(earlier / f / name), int) for f in ("again", "pictures"))
    assert np.abs(new - old).max() <= 2


@pytest.mark.slow
def test_an_exported_folder_loads(earlier: Path) -> None:
    """It holds its own code: what could break it is the package beside it, and its libraries."""
    folder = earlier / "pipeline-folder"
    fresh = run(
        earlier,
        *(sys.executable, "-m", "training.convert", "export", "runs/finished"),
        *("--to", "diffusers", "--out", "fresh"),
    )
    assert fresh.returncode == 0, fresh.stderr
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        shutil.copy(earlier / "fresh" / name, folder / name)
    options = json.dumps({"prompts": ["avocado on a blue background"], "num_inference_steps": 8})
    script = CHECKOUT / "tests/training/helpers/isolated_paint.py"
    pictures = []
    for each in (folder, earlier / "fresh"):
        painted = run(earlier, sys.executable, "-P", script, each, f"{each}.npy", options)
        assert painted.returncode == 0, painted.stderr
        pictures.append(np.load(f"{each}.npy").astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 2

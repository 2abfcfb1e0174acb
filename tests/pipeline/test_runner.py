"""`pipeline run` through Ray: real processes, killed for real."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline.roots import tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PIPELINE = str(Path(sys.executable).with_name("pipeline"))
CONFIG = """
source: openmoji
download: {glyphs: avocado;rocket;red heart;fox;owl;tent, size: 64, samples_per_shard: 8}
encode:
  vae: tiny4
  text_encoder: tiny-clip
  resolutions: [64]
  captions: alt:0.5,colour:0.5
  text: trimmed
"""
SHARDS = 7  # 6 glyphs x 7 backgrounds in eights, and 6 held-out pairs


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "data.yaml"
    path.write_text(CONFIG)
    return path


def command(config: Path, root: Path, stage: str, *more: str) -> list[str]:
    return [PIPELINE, "run", stage, "--config", str(config), "--root", str(root), *more]


def pipeline(config: Path, root: Path, stage: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, root, stage, *more), capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("uninterrupted")
    result = pipeline(config, root, "all", "--workers", "2")
    assert result.returncode == 0, result.stderr
    assert f"encode openmoji: {SHARDS} shards made (48 samples" in result.stdout
    return tree(root)


def copy_inputs(files: dict[str, bytes], root: Path) -> None:
    """A root on which download and caption have run, encode not."""
    for name, data in files.items():
        if "/images/" in name or "/captions/" in name:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def test_one_worker_gives_the_same_bytes_and_a_rerun_does_nothing(config, uninterrupted, tmp_path):
    assert pipeline(config, tmp_path, "all", "--workers", "1").returncode == 0
    assert tree(tmp_path) == uninterrupted
    again = pipeline(config, tmp_path, "all")
    assert again.returncode == 0
    assert again.stdout.count(f"0 shards made (0 samples), {SHARDS} already done") == 3
    assert tree(tmp_path) == uninterrupted


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_of_encode_at_any_moment_and_a_rerun_give_the_same_bytes(
    config, uninterrupted, tmp_path, seed
):
    copy_inputs(uninterrupted, tmp_path)
    before = tree(tmp_path)
    with subprocess.Popen(
        command(config, tmp_path, "encode"),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        # From the first commit on, every moment is as good as another.
        commits = tmp_path / "openmoji/latents/tiny4/64/commits"
        deadline = time.monotonic() + 120
        while not commits.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 1.5))
        os.kill(process.pid, signal.SIGKILL)
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    result = pipeline(config, tmp_path, "encode")
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path) == uninterrupted


def test_a_killed_worker_costs_only_time(config, uninterrupted, tmp_path):
    copy_inputs(uninterrupted, tmp_path)
    with subprocess.Popen(
        command(config, tmp_path, "encode"), stdout=subprocess.DEVNULL
    ) as process:
        killed = False
        while process.poll() is None and not killed:
            time.sleep(0.05)
            for pid in _workers_of(process.pid):
                os.kill(pid, signal.SIGKILL)
                killed = True
                break
    assert killed
    assert process.returncode == 0
    assert tree(tmp_path) == uninterrupted


def test_a_poisoned_shard_costs_only_itself(config, uninterrupted, tmp_path):
    copy_inputs(uninterrupted, tmp_path)
    tar = tmp_path / "openmoji/images/00002.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:700])
    result = pipeline(config, tmp_path, "encode")
    assert result.returncode == 1
    assert "1 failed" in result.stdout
    assert "failed: shard 00002: ReadError" in result.stdout
    tar.write_bytes(whole)
    assert pipeline(config, tmp_path, "encode").returncode == 0
    assert tree(tmp_path) == uninterrupted


def test_a_run_that_rejects_everything_fails(config, uninterrupted, tmp_path):
    copy_inputs(uninterrupted, tmp_path)
    result = pipeline(config, tmp_path, "encode", "--resolutions", "256", "--captions", "alt")
    assert result.returncode == 1
    assert "rejected: 48 too-small" in result.stdout
    assert "every sample was rejected" in result.stdout


def _workers_of(driver: int) -> list[int]:
    """Processes of the encode actors below a driver, found by Ray's process titles."""
    import psutil

    children = psutil.Process(driver).children(recursive=True)
    return [p.pid for p in children if "_Worker" in " ".join(p.cmdline())]

"""`pipeline run` through Ray: real processes, killed for real."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.helpers.roots import tree

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
    assert "6 shards made" in result.stdout
    assert "1 failed" in result.stdout
    assert "failed: shard 00002: BrokenShard" in result.stdout
    (row, *_) = status(config, tmp_path, "latents/tiny4/64")
    assert (row["done"], row["left"], list(row["failing"])) == (SHARDS - 1, 1, ["00002"])
    assert "has 700 bytes, its commit record says" in row["failing"]["00002"]
    tar.write_bytes(whole)
    assert pipeline(config, tmp_path, "encode").returncode == 0
    assert tree(tmp_path) == uninterrupted
    (row, *_) = status(config, tmp_path, "latents/tiny4/64")
    assert (row["done"], row["left"], row["failing"], row["stale"]) == (SHARDS, 0, {}, {})


def test_a_run_that_rejects_everything_commits_nothing(config, uninterrupted, tmp_path):
    copy_inputs(uninterrupted, tmp_path)
    result = pipeline(config, tmp_path, "encode", "--resolutions", "256", "--captions", "alt")
    assert result.returncode == 1
    assert result.stdout.count("TooManyRejects: ") == SHARDS
    assert "8 of 8 samples rejected (8 too-small; e.g. 000000000: 64 pixels" in result.stdout
    assert not list(tmp_path.glob("openmoji/latents/tiny4/256/commits/*.json"))


@pytest.mark.parametrize("whole_group", [False, True], ids=["driver", "process group"])
def test_sigterm_ends_the_run_within_20_s_with_a_code_of_its_own(
    config, uninterrupted, tmp_path, whole_group
):
    copy_inputs(uninterrupted, tmp_path)
    with begun(config, tmp_path) as process:
        started = time.monotonic()
        if whole_group:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        _, errors = process.communicate(timeout=60)
        spent = time.monotonic() - started
    assert process.returncode == 143, errors
    assert spent < 20
    assert "stopped; the same command goes on where it stopped" in errors
    left = tree(tmp_path)
    assert not [name for name in left if ".tmp-" in name or "/leases/" in name]
    assert set(left) < set(uninterrupted) | {n for n in left if n.endswith("json")}
    assert pipeline(config, tmp_path, "encode").returncode == 0
    assert tree(tmp_path) == uninterrupted


def test_a_second_run_is_told_who_holds_it_and_may_join(config, uninterrupted, tmp_path):
    copy_inputs(uninterrupted, tmp_path)
    with begun(config, tmp_path) as process:
        second = pipeline(config, tmp_path, "encode")
        joined = pipeline(config, tmp_path, "encode", "--join")
        process.communicate()
    assert second.returncode == 2
    assert f"is being written by process {process.pid} on" in second.stderr
    assert "--join" in second.stderr
    assert (process.returncode, joined.returncode) == (0, 0)
    assert tree(tmp_path) == uninterrupted


def test_one_encoder_is_not_loaded_for_the_others_group(config, uninterrupted, tmp_path):
    copy_inputs(uninterrupted, tmp_path)
    assert pipeline(config, tmp_path, "encode").returncode == 0
    for name, option in (("vae tiny16", "--vae=tiny16"), ("text encoder", "--captions=alt")):
        assert pipeline(config, tmp_path, "encode", "--workers=1", option).returncode == 0
        report = json.loads(max((tmp_path / "openmoji/runs/encode").iterdir()).read_text())
        (loaded,) = (name for name in report["counters"] if name.startswith("loaded"))
        assert loaded.startswith(f"loaded {name}")
    after = tree(tmp_path)
    assert {name: after[name] for name in uninterrupted} == uninterrupted


@contextlib.contextmanager
def begun(config: Path, root: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of encode that has committed its first shard and has more to do."""
    with subprocess.Popen(
        command(config, root, "encode", "--workers", "1"),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        commits = root / "openmoji/latents/tiny4/64/commits"
        while not commits.exists() and process.poll() is None:
            time.sleep(0.01)
        yield process


def status(config: Path, root: Path, group: str) -> list[dict]:
    line = [PIPELINE, "status", "--config", config, "--root", root, "--json"]
    rows = json.loads(subprocess.run(line, capture_output=True, check=True).stdout)
    return [row for row in rows if row["group"] == group and row["configured"]]


def _workers_of(driver: int) -> list[int]:
    """Processes of the encode actors below a driver, found by Ray's process titles."""
    import psutil

    children = psutil.Process(driver).children(recursive=True)
    return [p.pid for p in children if "_Worker" in " ".join(p.cmdline())]

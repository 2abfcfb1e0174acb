"""Processes killed at random moments, for real: the tree that is left equals the undisturbed one.

Five kills run with the slow tests; `make chaos` sets CHAOS_KILLS for many more.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.pipeline.helpers.cluster import RayCluster
from tests.pipeline.helpers.roots import tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

PIPELINE = str(Path(sys.executable).with_name("pipeline"))
KILLS = int(os.environ.get("CHAOS_KILLS", "5"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
CONFIG = """
source: openmoji
download:
  glyphs: avocado;rocket;red heart;fox;owl;tent;pizza;ghost;robot;rose;sun;star
  size: 512
  samples_per_shard: 4
encode:
  vae: tiny4
  text_encoder: tiny-clip
  resolutions: [64]
  captions: alt:0.5,colour:0.5
  text: trimmed
"""
SHARDS = 24  # 12 glyphs x 7 backgrounds in fours, and 12 held-out pairs
RUNS = 12  # after the last kill, at most, until a run ends well: kills may cost a shard 3 attempts
COMMITS = {
    "images": "openmoji/images/commits",
    "captions": "openmoji/captions/colour/commits",
    "latents": "openmoji/latents/tiny4/64/commits",
}
STAGES = tuple(COMMITS)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "data.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(command(config, root), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = tree(root)
    assert sum("/commits/" in name for name in files) == 4 * SHARDS
    return files


def command(config: Path, root: Path, address: str | None = None) -> list[str]:
    line = [PIPELINE, "run", "all", "--config", str(config), "--root", str(root)]
    return line + (["--address", address] if address else ["--workers", "2"])


def start(config: Path, root: Path, address: str | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(config, root, address),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def commits(root: Path, stage: str) -> int:
    return sum(1 for _ in root.glob(f"{COMMITS[stage]}/*.json"))


def wait_for_a_moment(
    process: subprocess.Popen, root: Path, stage: str, rng: random.Random
) -> bool:
    """Until a random number of the stage's commits are there, and a moment more; whether the stage
    is still under way."""
    wanted = rng.randrange(SHARDS)
    while process.poll() is None and commits(root, stage) < wanted:
        time.sleep(0.002)
    while process.poll() is None and not workers_below(process.pid) and not wanted:
        time.sleep(0.02)  # they start
    time.sleep(rng.uniform(0, 0.3 if stage == "latents" else 0.02))
    return process.poll() is None and commits(root, stage) < SHARDS


def workers_below(pid: int) -> list[psutil.Process]:
    """The actors of a run, found by Ray's process titles."""
    try:
        children = psutil.Process(pid).children(recursive=True)
        return [p for p in children if "_Worker" in " ".join(p.cmdline())]
    except psutil.Error:
        return []


def finish(config: Path, root: Path, process: subprocess.Popen | None, address=None) -> None:
    for _ in range(RUNS):
        process = process or start(config, root, address)
        output, _ = process.communicate(timeout=600)
        if process.returncode == 0:
            return
        assert process.returncode in (1, -signal.SIGKILL), output
        process = None
    pytest.fail(f"not done after {RUNS} runs: {output}")


def check(root: Path, undisturbed: dict[str, bytes]) -> None:
    found = tree(root)
    assert found.keys() == undisturbed.keys()
    assert [name for name in found if found[name] != undisturbed[name]] == []


@pytest.fixture
def clean_shared_memory() -> Iterator[None]:
    before = _shared_memory()
    yield
    deadline = time.monotonic() + 30  # Ray's processes notice their driver's death
    while (left := _shared_memory() - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


def _shared_memory() -> set[str]:
    """Without what trainings on the same machine have there (training.data.shared_memory)."""
    return {name for name in os.listdir("/dev/shm") if not re.match(r"\d{14}", name)}


def test_drivers_and_workers_killed(config, undisturbed, tmp_path, clean_shared_memory):
    """Two of three kills are of a worker; the third is of the driver, whose workers live on for a
    moment as orphans and may commit beside the rerun."""
    rng = random.Random(SEED)
    wanted = max(3, KILLS * 2 // 3)
    killed: Counter[str] = Counter()
    for number in range(20 * wanted):
        if killed.total() >= wanted:
            break
        root = tmp_path / f"{number}"
        process = None
        for stage in STAGES:
            process = process or start(config, root)
            if not wait_for_a_moment(process, root, stage, rng):
                continue
            if (killed.total() + number) % 3 == 2:  # each stage has its turn
                process.kill()
                process.communicate()
                process = None
                killed[f"driver in {stage}"] += 1
            elif workers := workers_below(process.pid):
                rng.choice(workers).kill()
                killed[f"worker in {stage}"] += 1
        finish(config, root, process)
        check(root, undisturbed)
        shutil.rmtree(root)
    assert killed.total() >= wanted
    print(f"{killed.total()} kills over {number} roots: {dict(sorted(killed.items()))}")


def test_raylets_killed(config, undisturbed, tmp_path, clean_shared_memory):
    """Nodes of a 3-node cluster die with all that runs there; each is replaced, as on spot."""
    rng = random.Random(SEED + 1)
    wanted = max(2, KILLS - KILLS * 2 // 3)
    killed: Counter[str] = Counter()
    with RayCluster(nodes=3) as cluster:
        for number in range(20 * wanted):
            if killed.total() >= wanted:
                break
            root = tmp_path / f"{number}"
            process = start(config, root, cluster.address)
            for stage in STAGES:
                if wait_for_a_moment(process, root, stage, rng):
                    cluster.kill_node()
                    killed[f"raylet in {stage}"] += 1
            finish(config, root, process, cluster.address)
            check(root, undisturbed)
            shutil.rmtree(root)
    assert killed.total() >= wanted
    print(f"{killed.total()} kills over {number} roots: {dict(sorted(killed.items()))}")

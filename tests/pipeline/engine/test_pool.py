"""The runner's pool on a stage of no work: shards that misbehave, GPUs, metrics."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config import build_stage, load_config
from pipeline.core import failures
from pipeline.core.catalog import Catalog
from pipeline.core.commits import read_commits
from pipeline.core.errors import SettingError
from pipeline.core.stage import Needs
from pipeline.core.store import Store
from pipeline.engine.plan import Choice, plan, preflight
from pipeline.engine.pool import ATTEMPTS, Options
from pipeline.engine.report import Report
from pipeline.engine.runner import run
from tests.pipeline.helpers.cluster import RayCluster
from tests.pipeline.helpers.tiny_stage import GROUP, TinyStage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_shards_that_misbehave_cost_themselves_and_are_listed(tmp_path):
    bad = {1: "raise", 3: "die", 4: "once", 6: "hang", 7: "reject"}
    stage = TinyStage(9, bad=bad)
    store = Store(tmp_path)
    report = run(stage, str(tmp_path), Options(workers=2, shard_timeout_s=1.5))
    assert list(read_commits(store, GROUP)) == ["00000", "00002", "00004", "00005", "00008"]
    assert (report.shards, report.failed) == (5, 4)
    assert report.failures["00001"] == "ValueError: this shard is poisoned"
    assert report.failures["00003"].startswith("worker died")
    assert report.failures["00006"].startswith("worker died")
    assert report.failures["00007"].startswith("TooManyRejects")
    # Three attempts each, but for the rejects, which would come again; and one of shard 4.
    assert report.retries == 3 * (ATTEMPTS - 1) + 1
    assert failures.read(store, GROUP).keys() == report.failures.keys()
    assert plan(stage, Catalog(store)).groups[GROUP].failing == report.failures
    mended = TinyStage(9)
    assert run(mended, str(tmp_path), Options(workers=2)).shards == 4
    assert failures.read(store, GROUP) == {}
    assert "failures" not in store.folders(GROUP)
    kept = store.read_json(f"toy/runs/tiny/{store.names('toy/runs/tiny')[-1]}")
    assert (kept["shards"], kept["failed"], kept["skipped"]) == (4, 0, 5)


def test_what_was_made_meanwhile_is_not_made_again(tmp_path):
    stage = TinyStage(6)
    store = Store(tmp_path)

    def interfere(report: Report) -> None:
        if report.shards == 1:  # an orphan of a dead run, say
            work = stage.open(store)
            for job in stage.plan(Catalog(store)):
                work(job)

    report = run(stage, str(tmp_path), Options(workers=1), interfere)
    assert report.shards + report.elsewhere == 6
    assert report.elsewhere >= 4
    forced = run(stage, str(tmp_path), Options(workers=1, choice=Choice(force=True)))
    assert (forced.shards, forced.elsewhere) == (6, 0)


def test_a_worker_with_two_shards_in_hand_makes_the_same(tmp_path):
    stage = TinyStage(9, needs=Needs(in_hand=2), bad={3: "once", 5: "raise"})
    report = run(stage, str(tmp_path), Options(workers=2))
    assert (report.shards, list(report.failures)) == (8, ["00005"])
    assert len(read_commits(Store(tmp_path), GROUP)) == 8


def test_workers_hold_gpus_only_where_the_stage_asks(tmp_path):
    with pytest.raises(SettingError, match="device=cuda: this machine offers Ray no GPU"):
        run(TinyStage(3, needs=Needs(gpus=1)), str(tmp_path / "none"), Options())
    with RayCluster(nodes=1, cpus=4, gpus=2) as cluster:
        options = Options(address=cluster.address)
        report = run(TinyStage(40, needs=Needs(gpus=1)), str(tmp_path / "gpu"), options)
        # As many workers as GPUs, not as CPUs, and each sees one.
        assert set(report.counters) <= {f"opened with devices {n}" for n in (0, 1)}
        assert 1 <= report.counters.total() <= 2
        report = run(TinyStage(40), str(tmp_path / "cpu"), options)
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
        assert set(report.counters) <= {"opened with devices ", f"opened with devices {hidden}"}


def test_relative_paths_are_those_of_the_commands_folder(tmp_path, monkeypatch):
    """Also on a cluster that somebody has started elsewhere."""
    pictures = tmp_path / "here" / "pics"
    pictures.mkdir(parents=True)
    Image.effect_noise((300, 300), 60).convert("RGB").save(pictures / "a.jpg")
    (pictures / "a.txt").write_text("noise")
    with RayCluster(nodes=1, cpus=2) as cluster:
        monkeypatch.chdir(tmp_path / "here")
        config = load_config("mine", None, {"kind": "folder", "download.folder": "pics"})
        report = run(build_stage("download", config), "root", Options(address=cluster.address))
    assert (report.shards, report.failed) == (1, 0)
    assert (tmp_path / "here" / "root" / "mine" / "images" / "00000.tar").is_file()


def test_ray_starts_without_a_home_to_write_in(tmp_path):
    """Ray would keep its token there; and its sockets under a TMPDIR too long for them."""
    long = tmp_path / ("d" * 110)
    long.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"TMPDIR": str(long), "HOME": "/proc/1"}
    command = [Path(sys.executable).with_name("pipeline"), "run", "download", "--source"]
    options = ["openmoji", "--set", "glyphs=avocado", "--root", str(tmp_path / "root")]
    found = subprocess.run([*command, *options], capture_output=True, text=True, env=env)
    assert found.returncode == 0, found.stderr
    assert "2 shards made" in found.stdout


def test_rays_metrics_carry_samples_rejects_and_bytes(tmp_path):
    found: dict[str, float] = {}

    def scrape(report: Report) -> None:
        import ray

        if report.shards >= 3 and len(found) < 3:
            port = ray.nodes()[0]["MetricsExportPort"]
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            for line in text.splitlines():
                for name in ("samples", "shards", "bytes"):
                    if line.startswith(f"ray_pipeline_{name}_total{{") and 'source="toy"' in line:
                        found[name] = float(line.rsplit(" ", 1)[1])

    stage = TinyStage(4, samples=5, bad={3: "slow"})
    run(stage, str(tmp_path), Options(workers=1), scrape)
    assert found["samples"] == 15
    assert found["shards"] == 3
    assert found["bytes"] > 0


def test_a_preflight_says_what_a_run_needs_and_refuses_what_does_not_fit(tmp_path, monkeypatch):
    store = Store(tmp_path)
    stage: Any = TinyStage(50)
    todo = plan(stage, Catalog(store))
    assert todo.need_bytes == 5000
    assert "50 shards left, 0 done; needs about 5.0 KB of " in preflight(stage, store, todo)
    monkeypatch.setattr(Store, "free_bytes", lambda self: 4000)
    with pytest.raises(SettingError, match=r"needs about 5.0 KB, 4.0 KB is free .* --shards"):
        run(stage, str(tmp_path), Options())
    monkeypatch.undo()
    store.write("other", b"x" * 3000)
    assert "3.0 KB of the quota of 9.0 KB is used" in preflight(stage, store, todo, quota=9000)
    with pytest.raises(SettingError, match=r"--quota 7.0 KB: 3.\d KB is used"):
        run(stage, str(tmp_path), Options(quota=7000))
    assert store.names(GROUP) == []
    started = time.monotonic()
    part = Options(quota=7000, choice=Choice("0-9"), workers=1)
    assert run(stage, str(tmp_path), part).shards == 10
    assert time.monotonic() - started < 60

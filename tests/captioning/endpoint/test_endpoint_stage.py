"""`pipeline run caption` with a server: what is written, and what must not be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core import layout
from pipeline.core.commits import read_commits
from pipeline.core.errors import SettingError
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.sources.openmoji import OpenMoji
from pipeline.stages.caption import CaptionStage
from pipeline.stages.download import Download
from tests.captioning.helpers.openai_server import Request, Server, error
from tests.pipeline.helpers.roots import run_here

GROUP = "openmoji/captions/endpoint-tiny"
KEY = "sk-very-secret-0123456789"
PIPELINE = str(Path(sys.executable).with_name("pipeline"))


def downloaded(folder: Path, shards: int) -> Store:
    store = Store(folder / "root")
    glyphs = ";".join(["avocado", "rocket", "fox", "red heart"])
    source = OpenMoji(glyphs=glyphs, backgrounds="blue,red", size=64, samples_per_shard=8 // shards)
    run_here(Download("openmoji", source), store)
    return store


def rows(store: Store) -> list[dict]:
    found = []
    for commit in read_commits(store, GROUP).values():
        table = from_parquet(store.read(f"{GROUP}/{commit.file('.parquet')}"))
        found += table.to_pylist()
    return found


def stored(store: Store) -> set[str]:
    return {
        row["key"]
        for commit in read_commits(store, layout.images_group("openmoji")).values()
        for row in from_parquet(
            store.read(f"openmoji/images/{commit.file('.parquet')}")
        ).to_pylist()
        if row["status"] == "success"
    }  # fmt: skip


def stage(url: str, **settings) -> CaptionStage:
    own = {"url": url, "model": "tiny", "retries": 20, "backoff_s": 0.01, **settings}
    return CaptionStage("openmoji", "endpoint", 0.9, own)


def told(folder: Path) -> bytes:
    """All that was written."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_parquet_says_what_wrote_a_caption_and_that_it_is_best_effort(tmp_path, monkeypatch):
    monkeypatch.setenv("MICRODIT_ENDPOINT_KEY", KEY)
    store = downloaded(tmp_path, 1)

    def behave(request: Request):
        return error(500, f"{KEY} died") if request.number % 3 == 1 else None

    with Server(behave) as server:
        made = stage(server.url)
        assert made.groups() == [GROUP]
        assert made.needs.workers == 1
        assert run_here(made, store) > 0
        assert run_here(stage("http://127.0.0.1:1", concurrency=3), store) == 0  # nothing is stale
    found = rows(store)
    assert {row["key"] for row in found} == stored(store)
    assert len(found) == len(stored(store))
    for row in found:
        assert row["caption"].startswith("picture ")
        assert (row["captioner"], row["revision"]) == ("endpoint", "tiny")
        assert (row["tokens"], row["finish_reason"], row["best_effort"]) == (7, "stop", True)
    assert KEY.encode() not in told(tmp_path)


def test_a_server_that_knows_no_such_model_is_one_line_and_nothing_is_written(tmp_path):
    store = downloaded(tmp_path, 1)
    with (
        Server(lambda request: error(404, "no model")) as server,
        pytest.raises(SettingError, match="404: no model; model=tiny"),
    ):
        run_here(stage(server.url), store)
    assert read_commits(store, GROUP) == {}


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_captions_nothing_twice(tmp_path, monkeypatch):
    """Through the command, Ray's worker and a server that fails now and then."""
    monkeypatch.setenv("MICRODIT_ENDPOINT_KEY", KEY)
    store = downloaded(tmp_path, 8)

    def behave(request: Request):
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        time.sleep(0.05)  # one at a time: there is something left to kill
        return error(503, f"{KEY} is overloaded") if request.number % 4 == 1 else None

    def command(url: str) -> list[str]:
        own = ["--captioner", "endpoint", "--url", url, "--model", "tiny", "--concurrency", "2"]
        sets = ["--set", "backoff_s=0.01", "--set", "retries=20"]
        return [
            PIPELINE,
            "run",
            "caption",
            "--source",
            "openmoji",
            "--root",
            store.root,
            *own,
            *sets,
        ]

    with Server(behave) as server:
        with subprocess.Popen(
            command(server.url), stdout=subprocess.PIPE, start_new_session=True
        ) as first:
            while first.poll() is None and not read_commits(store, GROUP):
                time.sleep(0.01)
            os.killpg(first.pid, signal.SIGKILL)
        assert rows(store)
        done = subprocess.run(command(server.url), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert sorted(row["key"] for row in rows(store)) == sorted(stored(store))
    refused = subprocess.run(
        [*command(server.url), "--force"], capture_output=True, text=True
    )  # the server is gone
    assert refused.returncode == 2
    assert "no server answers" in refused.stderr.strip().splitlines()[-1]
    assert "Traceback" not in refused.stderr
    printed = done.stdout + done.stderr + refused.stdout + refused.stderr
    assert KEY not in printed
    assert KEY.encode() not in told(tmp_path)

"""`pipeline status`, `--dry-run` and progress: what people read."""

from __future__ import annotations

import json
import os
import pty
import sys
import time
from pathlib import Path

import pytest

from pipeline.commands.sources import settings
from pipeline.commands.summary import summarise
from pipeline.core.catalog import Catalog
from pipeline.engine.plan import Choice, plan, preflight
from pipeline.engine.pool import Options
from pipeline.engine.progress import Progress
from pipeline.engine.report import Report
from pipeline.engine.runner import run
from pipeline.sources import SOURCES
from pipeline.stages.caption import CaptionStage
from pipeline.stages.download import Download
from tests.pipeline.helpers.command import call
from tests.pipeline.helpers.roots import SETTINGS, run_here

PIPELINE = Path(sys.executable).with_name("pipeline")
LARGER = Download("openmoji", SETTINGS.model_copy(update={"size": 72}))
CONFIG = """
source: openmoji
caption: {captioner: colour}
encode: {vae: tiny4, text_encoder: tiny-clip, resolutions: [64, 128], text: trimmed}
"""


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "openmoji.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_a_dry_run_does_not_count_stale_shards_as_done(downloaded):
    todo = plan(LARGER, Catalog(downloaded))
    assert (todo.done, todo.outdated, len(todo.pending)) == (0, 2, 0)
    line = preflight(LARGER, downloaded, todo)
    assert "0 shards left, 0 done, 2 stale (--stale redoes them); needs" in line
    todo = plan(LARGER, Catalog(downloaded), Choice("00000", stale=True))
    assert (todo.done, todo.outdated, len(todo.pending)) == (0, 0, 1)
    run_here(LARGER, downloaded, Choice("00000", stale=True))
    todo = plan(LARGER, Catalog(downloaded))
    assert (todo.done, todo.outdated) == (1, 1)


def test_a_run_that_leaves_all_as_it_is_says_what_is_stale(downloaded, capsys):
    report = run(LARGER, downloaded.root, Options())
    assert (report.skipped, report.outdated) == (0, 2)
    summarise(report)
    out = capsys.readouterr().out
    assert "0 already done, 2 stale, 0 failed" in out
    assert "stale: 2 shards: " in out
    assert "[" not in out
    assert "(" not in out.partition("stale: ")[2]


@pytest.mark.parametrize("width", [80, 160])
def test_every_group_can_be_told(downloaded, config, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    # As many names as a root has after some ablations, equal but for their ends.
    for number in range(3):
        name = f"llava-hf--llava-1.5-7b-hf.medium.cleaned-habits+rules+lower.seed-{number}"
        for kind in ("images", "captions/colour"):
            commit = downloaded.read(f"openmoji/{kind}/commits/00000.json")
            downloaded.write(f"openmoji/captions/{name}-{kind[:3]}/commits/00000.json", commit)
    arguments = ["--root", downloaded.root, "--config", config]
    code, out, _ = call(monkeypatch, capsys, "status", *arguments)
    assert code == 0
    _, listed, _ = call(monkeypatch, capsys, "status", "--json", *arguments)
    for row in json.loads(listed):
        assert len([line for line in out.splitlines() if row["group"] in line]) >= 1
    assert "…" not in out
    assert "5 train, 1 heldout" in out or "3 train, 3 heldout" in out


def test_groups_that_nobody_has_begun(downloaded, config, monkeypatch, capsys):
    arguments = ["status", "--root", downloaded.root, "--config", config]
    _, out, _ = call(monkeypatch, capsys, *arguments)
    _, listed, _ = call(monkeypatch, capsys, *arguments, "--json")
    rows = {row["group"]: row for row in json.loads(listed)}
    assert list(rows) == [
        "captions/colour",
        "images",
        "latents/tiny4/128",
        "latents/tiny4/64",
        "text/tiny-clip/alt.trimmed",
    ]
    assert {g for g, row in rows.items() if not row["begun"]} == set(list(rows)[2:])
    assert (rows["latents/tiny4/64"]["done"], rows["latents/tiny4/64"]["left"]) == (0, 2)
    assert "not begun: openmoji/latents/tiny4/128: " in out
    assert "pipeline run encode --source openmoji" in out


def test_a_rate_is_that_of_the_group(downloaded, monkeypatch, capsys):
    run_here(CaptionStage("openmoji", "colour", clean="lower"), downloaded)
    for label, seconds in (("colour", 2.0), ("colour.lower", 4.0)):
        report = Report("caption", "openmoji", shards=1, samples=8, seconds=seconds)
        report.started_at = seconds
        report.groups = {f"openmoji/captions/{label}": {"samples": 8, "bytes": 1}}
        path = report.write(downloaded)
        assert "page" not in downloaded.read_json(path)
        assert "in_hand" not in downloaded.read_json(path)
    _, out, _ = call(monkeypatch, capsys, "status", "--root", downloaded.root, "--json")
    rates = {row["group"]: row["samples_per_s"] for row in json.loads(out)}
    assert (rates["captions/colour"], rates["captions/colour.lower"]) == (4.0, 2.0)
    assert rates["images"] is None


def test_a_report_names_its_page(downloaded):
    stage = CaptionStage("openmoji", "colour", clean="lower")
    report = Report(stage.name, stage.source, shards=1)
    report.page = report.path().removesuffix(".json") + ".html"
    assert downloaded.read_json(report.write(downloaded))["page"] == report.page


def test_progress_within_a_shard():
    report = Report("download", "folder", total=1, workers=1)
    progress = Progress("download folder")
    facts = []
    for second in range(3):
        report.seconds = float(second)
        report.in_hand = {"00000": (100 * second, 400)}
        facts.append(progress._facts(report))
    assert facts[-1] == (
        "0 samples · 200 in hand · 100 samples/s · 0 rejects · 1 workers · 2 s left"
    )
    assert report.advanced == 0.5


@pytest.mark.parametrize("source", SOURCES)
def test_every_setting_of_a_source_has_a_meaning(source):
    assert [setting.name for setting in settings(source) if not setting.meaning] == []


def test_settings_of_a_source(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "sources", "urls")
    assert code == 0
    assert "--set url_list=…\n      required. a file, or a folder of files of one format\n" in out
    assert "--set retries=2\n      tries more, after 429" in out
    assert "--set robots=true\n" in out
    code, out, _ = call(monkeypatch, capsys, "sources")
    assert [line.split(":")[0] for line in out.splitlines()[:-1]] == list(SOURCES)
    code, _, err = call(monkeypatch, capsys, "sources", "url")
    assert (code, err.count("\n")) == (2, 1)
    assert 'did you mean "urls"?' in err


@pytest.mark.parametrize(
    "command", [[], ["run"], ["run", "download"], ["convert", "export"], ["drop"], ["sources"]]
)
def test_short_help(monkeypatch, capsys, command):
    code, out, _ = call(monkeypatch, capsys, *command, "-h")
    assert code == 0
    assert out.startswith(f"Usage: {' '.join(['pipeline', *command])}")


def test_version(monkeypatch, capsys):
    from training import convert, generate, scores, train

    assert call(monkeypatch, capsys, "--version")[:2] == (0, "microdit 0.1.0\n")
    for module in (generate, scores, convert):
        with pytest.raises(SystemExit):
            module.main(["--version"])
        assert capsys.readouterr().out == "microdit 0.1.0\n"
    assert train.main(["--version"]) == 0
    assert capsys.readouterr().out == "microdit 0.1.0\n"


@pytest.mark.slow
def test_a_terminal_shows_a_line_at_once_and_samples_within_a_shard(tmp_path):
    began, first, shown = time.monotonic(), 0.0, b""
    arguments = ["--source", "openmoji", "--root", str(tmp_path), "--workers", "1"]
    sets = ["glyphs=all", "backgrounds=blue", "samples_per_shard=9999"]
    command = [str(PIPELINE), "run", "download", *arguments]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["COLUMNS"] = "150"
        os.execv(PIPELINE, [*command, *(word for pair in sets for word in ("--set", pair))])
    try:
        while True:
            data = os.read(terminal, 1 << 16)
            first = first or time.monotonic() - began
            shown += data
    except OSError:  # its end
        pass
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert shown.startswith(b"run download: reading settings")
    assert first < 5
    assert b" in hand" in shown

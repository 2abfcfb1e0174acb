"""`pipeline prune`: only what no commit names, only when told to, never under a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.core import process
from pipeline.core.store import Store, temporary_name
from pipeline.dropping.prune import common, find
from pipeline.engine.plan import Choice
from pipeline.stages.caption import CaptionStage
from pipeline.stages.download import Download
from tests.pipeline.helpers.roots import SETTINGS, run_here

IMAGES = "openmoji/images"
CAPTIONS = "openmoji/captions/colour"


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["pipeline", "prune", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def files(store: Store) -> set[str]:
    root = Path(store.root)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def dead() -> str:
    """The identity of a process of this host that is gone."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    who = process.identity(child.pid)
    child.kill()
    child.wait()
    return who


def litter(store: Store, dead: str) -> set[str]:
    """Files that no commit names, of every kind."""
    root = Path(store.root)
    names = {
        f"{IMAGES}/00007.tar",
        f"{IMAGES}/00007_stats.json",
        f"{IMAGES}/.00000.tar.tmp-{dead}-0123abcd",
        f"{IMAGES}/commits/.00000.json.tmp-elsewhere-1-2-0123abcd",
        f"{CAPTIONS}/rejects/00000-old.parquet",
        f"{CAPTIONS}/00000-0123456789abcdef.parquet",
        "openmoji/latents/tiny4/64/00000-0123456789abcdef.mds",  # its run died before a commit
        f"openmoji/drops/.a.json.tmp-{dead}-0123abcd",
    }
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * 1000)
    return names


def keep(store: Store) -> None:
    """Files that are to stay, of every kind."""
    store.write_json("openmoji/runs/download/1.json", {})
    store.write_json("openmoji/drops/1.json", {"schema": 1, "shards": {}})
    store.write_json(f"{CAPTIONS}/failures/00009.json", {"error": "x", "attempts": 3})
    store.write(f"{IMAGES}/commits.jsonl.gz", b"")
    store.write("openmoji/notes.txt", b"mine")
    store.write("other/notes/mine.txt", b"mine")
    living = temporary_name("00001.tar")
    Path(store.url(f"{IMAGES}/{living}")).write_bytes(b"")


def test_lists_and_deletes_what_no_commit_names(downloaded, monkeypatch, capsys, dead):
    root = ["--root", downloaded.root]
    keep(downloaded)
    sound = files(downloaded)
    code, out, _ = call(monkeypatch, capsys, *root)
    assert (code, out) == (0, "in all: 0 files, 0 B\n")
    names = litter(downloaded, dead)
    code, out, _ = call(monkeypatch, capsys, *root)
    assert code == 0
    assert "in all: 8 files, 8.0 KB" in out
    assert f"{IMAGES}: 4 files, 4.0 KB (" in out
    assert "openmoji/latents/tiny4/64: 1 files, 1.0 KB (00000-0123456789abcdef.mds)" in out
    assert "--yes deletes them" in out
    assert files(downloaded) == sound | names
    code, out, _ = call(monkeypatch, capsys, *root, "--json")
    record = json.loads(out)
    listed = {file["path"] for group in record["groups"] for file in group["files"]}
    assert (code, listed, record["deleted"]) == (0, names, False)
    code, out, _ = call(monkeypatch, capsys, *root, "--yes")
    assert code == 0
    assert out.endswith("freed: 8 files, 8.0 KB\n")
    assert files(downloaded) == sound
    assert not (Path(downloaded.root) / CAPTIONS / "rejects").exists()


def test_frees_what_a_redone_shard_replaced(downloaded, monkeypatch, capsys):
    changed = SETTINGS.model_copy(update={"size": 32})
    assert run_here(Download("openmoji", changed), downloaded, Choice(stale=True)) == 2
    assert run_here(CaptionStage("openmoji", "colour"), downloaded, Choice(stale=True)) == 2
    before = files(downloaded)
    assert call(monkeypatch, capsys, "--root", downloaded.root, "--yes")[0] == 0
    gone = before - files(downloaded)
    assert {f"{IMAGES}/00000.tar", f"{IMAGES}/00000.parquet"} < gone
    assert f"{IMAGES}/00000_stats.json" in gone
    assert len([name for name in gone if name.startswith(IMAGES)]) == 6
    assert find(downloaded, "openmoji") == []
    assert run_here(Download("openmoji", changed), downloaded) == 0


def test_refuses_while_a_run_holds_a_group(downloaded, monkeypatch, capsys, dead):
    names = litter(downloaded, dead)
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        me = process.identity(holder.pid)
        record = {"owner": me, "command": "pipeline run encode", "counter": 1}
        # A group that has no commit yet, as at the beginning of its first run.
        downloaded.write_json(f"openmoji/latents/tiny4/64/leases/{me}.json", record)
        code, out, err = call(monkeypatch, capsys, "--root", downloaded.root, "--yes")
        assert (code, out) == (2, "")
        assert f"is being written by process {holder.pid}" in err
        assert names < files(downloaded)
    finally:
        holder.kill()
        holder.wait()
    assert call(monkeypatch, capsys, "--root", downloaded.root, "--yes")[0] == 0
    assert not names & files(downloaded)


def test_what_was_written_since_it_was_listed_stays(downloaded, dead):
    litter(downloaded, dead)
    listed = find(downloaded, "openmoji")
    downloaded.write(f"{IMAGES}/00007.tar", b"of a run that came and died meanwhile")
    downloaded.write(f"{IMAGES}/00008.tar", b"likewise")
    left = {
        entry.path
        for found in common(listed, find(downloaded, "openmoji"))
        for entry in found.files
    }
    assert f"{IMAGES}/00007_stats.json" in left
    assert not left & {f"{IMAGES}/00007.tar", f"{IMAGES}/00008.tar"}


def test_a_broken_commit_stops_it(downloaded, monkeypatch, capsys, dead):
    names = litter(downloaded, dead)
    Path(downloaded.url(f"{CAPTIONS}/commits/00000.json")).write_text("{")
    code, _, err = call(monkeypatch, capsys, "--root", downloaded.root, "--yes")
    assert code == 2
    assert "pipeline verify --repair" in err
    assert names < files(downloaded)


def test_a_folder_that_is_no_root_is_left_alone(monkeypatch, capsys, tmp_path):
    photos = tmp_path / "holidays" / "images" / "2024"
    photos.mkdir(parents=True)
    (photos / "beach.jpg").write_bytes(b"x")
    code, _, err = call(monkeypatch, capsys, "--root", str(tmp_path), "--yes")
    assert code == 2
    assert "nothing there" in err
    assert (photos / "beach.jpg").exists()


def test_on_a_terminal_it_asks(downloaded, monkeypatch, capsys, dead):
    names = litter(downloaded, dead)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter([False, True])
    monkeypatch.setattr("typer.confirm", lambda question, err: next(answers))
    assert "nothing was deleted" in call(monkeypatch, capsys, "--root", downloaded.root)[1]
    assert names < files(downloaded)
    assert "freed: 8 files" in call(monkeypatch, capsys, "--root", downloaded.root)[1]
    assert not names & files(downloaded)


@pytest.mark.slow
def test_on_s3(downloaded, monkeypatch, capsys, tmp_path):
    """Against a real server: superseded objects, and uploads that nobody will complete."""
    from tests.pipeline.helpers.s3 import BUCKET, S3Server, variables

    with S3Server(tmp_path / "s3") as server, variables(server.environment()):
        root = f"s3://{BUCKET}/deep/root"
        store = Store(root)
        for name in files(downloaded):
            store.write(name, downloaded.read(name))
        client = server.client()
        mine, others = f"deep/root/{IMAGES}/00009.tar", "deep/rootless/openmoji/images/x.tar"
        for key in (mine, mine, others):
            sent = client.create_multipart_upload(Bucket=BUCKET, Key=key)
            client.upload_part(
                Bucket=BUCKET, Key=key, PartNumber=1, UploadId=sent["UploadId"], Body=b"x" * 100
            )
        changed = SETTINGS.model_copy(update={"size": 32})
        assert run_here(Download("openmoji", changed), store, Choice(stale=True)) == 2
        code, out, err = call(monkeypatch, capsys, "--root", root)
        assert (code, err) == (0, "")
        assert f"{IMAGES}: 6 files" in out
        assert "; 2 unfinished uploads" in out
        code, out, _ = call(monkeypatch, capsys, "--root", root, "--yes")
        assert code == 0
        assert "freed: 6 files" in out
        assert out.endswith(", 2 unfinished uploads\n")
        left = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        assert [upload["Key"] for upload in left] == [others]
        assert find(store, "openmoji") == []
        monkeypatch.setattr(sys, "argv", ["pipeline", "verify", "--root", root, "--workers", "2"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert int(stop.value.code or 0) == 0, capsys.readouterr().out

"""The folder and hf sources on a real S3 server, and a run of workers over a folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.samples import RawImage, Reject
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.sources.folder import Folder
from pipeline.sources.hf import HubDataset
from pipeline.stages.download import Download
from tests.hostile.pictures import encoded, jpeg, photo
from tests.pipeline.helpers.roots import run_here, tree
from tests.pipeline.helpers.s3 import BUCKET, S3Server, variables
from tests.pipeline.sources.test_hf import FILES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[S3Server]:
    pytest.importorskip("s3fs")
    folder = tmp_path_factory.mktemp("seaweedfs")
    with S3Server(folder) as server, variables(server.environment()):
        yield server
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cats(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("cats")
    (home / "more").mkdir()
    for number in range(40):
        name = f"{'more/' if number % 2 else ''}cat-{number:02d} é+%20"
        (home / f"{name}.jpg").write_bytes(jpeg(number))
        if number != 7:
            (home / f"{name}.txt").write_text(f"cat {number}")
    return home


def upload(server: S3Server, prefix: str, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        server.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=data)
    return f"s3://{BUCKET}/{prefix}"


def test_a_folder_in_a_bucket_gives_what_a_local_one_gives(server, cats, tmp_path):
    files = {str(p.relative_to(cats)): p.read_bytes() for p in cats.rglob("*") if p.is_file()}
    url = upload(server, "cats", files)
    tars = []
    for name, folder in (("local", str(cats)), ("s3", url)):
        store = Store(tmp_path / name)
        run_here(Download("folder", Folder(folder=folder)), store)
        tars.append([store.read(f"folder/images/00000.{e}") for e in ("tar", "parquet")])
    assert tars[0] == tars[1]


def test_names_that_look_like_patterns_are_names(server):
    names = ("a[1]", "a*", "a?b", "{c}", "d#e", "plain", "a1")
    files = {f"{n}.jpg": jpeg(i) for i, n in enumerate(names)} | {
        f"{n}.txt": n.encode() for n in names
    }
    source = Folder(folder=upload(server, "set [1]", files))
    items = [item for shard in source.shards() for item in source.fetch(shard)]
    found = {i.ref.url: (i.ref.caption, i.data) for i in items if isinstance(i, RawImage)}
    assert found == {f"{n}.jpg": (n, files[f"{n}.jpg"]) for n in names}


def test_what_is_replaced_in_a_bucket_makes_its_shard_stale(server):
    url = upload(server, "two", {n: jpeg(1) for n in ("a.jpg", "b.jpg")} | {"a.txt": b"a"})
    source = Folder(folder=url, samples_per_shard=1)
    before = [shard.spec for shard in source.shards()]
    assert before == [shard.spec for shard in source.shards()]
    upload(server, "two", {"a.txt": b"b"})
    after = [shard.spec for shard in source.shards()]
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_what_is_deleted_under_way_is_a_reject(server):
    url = upload(server, "gone", {"a.jpg": jpeg(1), "a.txt": b"a"})
    source = Folder(folder=url)
    (shard,) = source.shards()
    server.client().delete_object(Bucket=BUCKET, Key="gone/a.jpg")
    (item,) = source.fetch(shard)
    assert isinstance(item, Reject)
    assert item.reason == "failed_to_download"


def test_parquet_files_in_a_bucket(server, monkeypatch, tmp_path):
    monkeypatch.setenv("MICRODIT_SCRATCH", str(tmp_path / "scratch"))
    source = HubDataset(repo=upload(server, "many", FILES), samples_per_shard=4)
    items = [item for shard in source.shards() for item in source.fetch(shard)]
    assert all(isinstance(item, RawImage) for item in items)
    assert [i.ref.caption for i in items if isinstance(i, RawImage)] == [
        f"picture {n}" for n in range(10)
    ]


def test_one_worker_and_three_make_the_same_of_a_folder(cats, tmp_path):
    """And shrunk pictures among them."""
    (cats / "large.png").write_bytes(encoded(photo(900, 700), "PNG"))
    (cats / "large.txt").write_text("large")
    for workers in ("1", "3"):
        command = [BIN / "pipeline", "run", "download", "--source", "cats", "--kind", "folder"]
        command += ["--set", f"folder={cats}", "--set", "samples_per_shard=7"]
        command += ["--root", tmp_path / workers, "--workers", workers]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "1 no-caption" in done.stdout + done.stderr
    assert tree(tmp_path / "1") == tree(tmp_path / "3")
    rows = [
        row
        for number in range(6)
        for row in from_parquet(
            Store(tmp_path / "1").read(f"cats/images/{number:05d}.parquet")
        ).to_pylist()
    ]
    large = next(row for row in rows if row["url"] == "large.png")
    assert (large["width"], large["height"], large["original_width"]) == (658, 512, 900)
    assert len(rows) == 41

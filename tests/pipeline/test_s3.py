"""A data root on a real S3 server: whole objects, faults on the way, the demo, the summary."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.commands.status import collect
from pipeline.config import build_stage, load_config
from pipeline.core import layout, remote, summary
from pipeline.core.commits import read_commits, write_shard
from pipeline.core.errors import StorageError
from pipeline.core.groups import publish
from pipeline.core.samples import InputShard
from pipeline.core.store import Store
from tests.checkout import ROOT
from tests.pipeline.helpers.faulty import Fault, FaultyProxy
from tests.pipeline.helpers.roots import run_here, tree
from tests.pipeline.helpers.s3 import BUCKET, SECRET, S3Server, variables

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BIN = Path(sys.executable).parent
CONFIG = """
source: openmoji
download: {glyphs: avocado;rocket;red heart;fox, size: 64, samples_per_shard: 8}
encode:
  vae: tiny4
  text_encoder: tiny-clip
  resolutions: [64]
  captions: alt:0.5,colour:0.5
  text: trimmed
"""
STAGES = ("download", "caption", "encode")
BIG = 110_000_000  # bytes, which s3fs sends in three parts; below 100 MB in one PUT
QUICK = {"AWS_MAX_ATTEMPTS": "2"}  # where the store is to fail in the end, it may do so soon


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[S3Server]:
    pytest.importorskip("s3fs")
    folder = tmp_path_factory.mktemp("seaweedfs")
    with S3Server(folder) as server:
        yield server
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def running(server) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(server, running) -> Iterator[FaultyProxy]:
    """Between this process (its environment says so) and the server; in good health."""
    running.heal()
    with variables(server.environment(running.url)):
        yield running
    running.heal()


@pytest.fixture
def store(proxy, request) -> Store:
    return Store(f"s3://{BUCKET}/{re.sub(r'[^a-z0-9]', '-', request.node.name)}")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "data.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def local(config, tmp_path_factory) -> dict[str, bytes]:
    """The tree of a local root that nothing disturbed."""
    root = tmp_path_factory.mktemp("local")
    data = load_config(None, config, {})
    for name in STAGES:
        run_here(build_stage(name, data), Store(root))
    return tree(root)


@pytest.fixture(scope="module")
def made(config, server, running) -> str:
    """A root on S3, made by the commands themselves."""
    root = f"s3://{BUCKET}/made"
    running.heal()
    for stage in STAGES:
        result = pipeline(server.environment(running.url), "run", stage, config, root)
        assert result.returncode == 0, result.stderr
    return root


def pipeline(
    environment: dict[str, str], *words: str | Path, more: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words, *more),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=200,
    )


def command(*words: str | Path) -> list[str]:
    """`pipeline run STAGE CONFIG ROOT …` or `pipeline status CONFIG ROOT …` in full."""
    names = 2 if words[0] == "run" else 1
    verb, (config, root, *more) = words[:names], words[names:]
    flags = ["--config", config, "--root", root, *more]
    return [str(word) for word in (BIN / "pipeline", *verb, *flags)]


def remote_tree(root: str) -> dict[str, bytes]:
    """What `roots.tree` is of a local root: without the summary, which only S3 has."""
    store = Store(root)
    paths = [
        entry.path
        for entry in store.walk("")
        if not entry.path.endswith(("_stats.json", summary.NAME)) and "/runs/" not in entry.path
    ]
    return {p: d for p, d in zip(paths, store.read_many(paths), strict=True) if d is not None}


def copy_inputs(files: dict[str, bytes], root: str) -> None:
    """A root on which download and caption have run, encode not."""
    store = Store(root)
    for name, data in files.items():
        if "/images/" in name or "/captions/" in name:
            store.write(name, data)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The error that a command ended with: one line, and not a word about a secret."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert SECRET not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()  # before it perhaps what a run announces it will need
    assert [line for line in lines if line.startswith("pipeline: ")] == lines[-1:]
    assert lines[-1].startswith("pipeline: cannot ")
    return lines[-1]


# --- The store


def test_objects_come_back_whole_and_listed(store):
    store.write("a/b/x.bin", b"12")
    store.write("a/b/x.bin", b"345")
    store.write("a/c.json", b"{}")
    assert store.read("a/b/x.bin") == b"345"
    assert store.names("a/b") == ["x.bin"]
    assert store.names("a") == ["c.json"]
    assert store.folders("a") == ["b"]
    assert store.folders("") == ["a"]
    assert [entry.path for entry in store.walk("a")] == ["a/b/x.bin", "a/c.json"]
    assert [entry.path for entry in store.entries("a")] == ["a/c.json"]
    assert store.exists("a/b/x.bin")
    assert not store.exists("a/b/y.bin")
    assert store.names("nowhere") == store.folders("nowhere") == store.entries("nowhere") == []
    assert list(store.walk("nowhere")) == []
    with pytest.raises(FileNotFoundError):
        store.read("a/b/y.bin")
    assert list(store.read_many(["a/c.json", "a/gone", "a/b/x.bin"])) == [b"{}", None, b"345"]
    assert list(store.read_many(["a/c.json"])) == [b"{}"]
    assert store.free_bytes() is None
    store.delete("a/b/x.bin")
    store.delete("a/b/x.bin")
    assert [entry.path for entry in store.walk("")] == ["a/c.json"]


def test_a_listing_shows_what_another_process_did_a_moment_ago(server, store):
    key = store.url("g/commits").split("/", 3)[3]
    before = store.entries("g/commits")
    server.client().put_object(Bucket=BUCKET, Key=f"{key}/00000.json", Body=b"1")
    (first,) = store.entries("g/commits")
    server.client().put_object(Bucket=BUCKET, Key=f"{key}/00000.json", Body=b"2")
    (second,) = store.entries("g/commits")
    server.client().delete_object(Bucket=BUCKET, Key=f"{key}/00000.json")
    assert (before, store.entries("g/commits")) == ([], [])
    assert first.version != second.version


def test_a_read_is_one_request_and_a_folder_that_is_not_there_lists_no_other(store, proxy):
    for n in range(3):
        store.write(f"g/{n}.mds", bytes(10))
    proxy.heal()
    store.read("g/0.mds")
    list(store.read_many(["g/1.mds", "g/2.mds"]))
    assert len(proxy.seen) == 3
    proxy.heal()
    assert store.names("g/failures") == []
    assert len(proxy.seen) == 1


@pytest.mark.parametrize(
    ("size", "path"), [(3_000_000, "/x"), (BIG, "partNumber=2")], ids=["put", "multipart"]
)
def test_a_kill_in_mid_upload_leaves_no_object_and_a_rerun_writes_it(store, proxy, size, path):
    code = f"from pipeline.core.store import Store; Store({store.root!r}).write('x', bytes({size}))"
    upload = [sys.executable, "-c", code]
    held = proxy.fault(Fault("PUT", path, hold_upload=200_000))
    with subprocess.Popen(upload, cwd=ROOT) as process:
        assert held.begun.wait(60)
        assert not store.exists("x")
        process.kill()
    time.sleep(1)  # for the server to hear of it
    assert list(store.walk("")) == []
    proxy.heal()
    subprocess.run(upload, cwd=ROOT, check=True)
    assert store.read("x") == bytes(size)
    assert [(entry.path, entry.bytes) for entry in store.entries("")] == [("x", size)]


# --- Faults on the way


@pytest.mark.parametrize("status", [500, 503])
def test_a_store_that_fails_three_times_costs_only_time(store, proxy, status):
    write = proxy.fault(Fault("PUT", times=3, status=status))
    read = proxy.fault(Fault("GET", "/x", times=3, status=status))
    store.write("x", b"whole")
    assert store.read("x") == b"whole"
    assert (write.hits, read.hits) == (3, 3)


def test_a_store_that_always_fails_is_one_error_within_a_minute(store, proxy):
    proxy.fault(Fault("PUT", status=503))
    started = time.monotonic()
    with pytest.raises(StorageError) as error:
        store.write("x", bytes(3_000_000))
    assert time.monotonic() - started < 60
    for part in (f"cannot write {store.url('x')}", "3.0 MB", "run the same command again"):
        assert part in str(error.value)
    proxy.heal()
    assert list(store.walk("")) == []


def test_a_large_upload_survives_a_part_that_fails_and_leaves_none_behind(server, store, proxy):
    proxy.fault(Fault("PUT", "partNumber=2", times=1, status=500))
    proxy.fault(Fault("PUT", "partNumber=3", times=1, cut_upload=500_000))
    proxy.fault(Fault("POST", "uploadId", times=1, status=503))
    store.write("x", bytes(BIG))
    assert store.read("x") == bytes(BIG)
    with variables(server.environment(proxy.url, **QUICK)):
        proxy.fault(Fault("PUT", "partNumber=2", status=500))
        with pytest.raises(StorageError, match=r"110\.0 MB"):
            Store(store.root).write("y", bytes(BIG))
    assert store.names("") == ["x"]
    prefix = store.root.split("/", 3)[3]
    assert "Uploads" not in server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)


def test_a_connection_cut_on_the_way_is_opened_again(store, proxy):
    data = os.urandom(3_000_000)
    cuts = [
        proxy.fault(Fault("PUT", times=2, cut_upload=100_000)),
        proxy.fault(Fault("GET", "/x", times=1, cut_download=100_000)),
    ]
    store.write("x", data)
    assert store.read("x") == data
    cuts.append(proxy.fault(Fault("GET", "/x", times=1, cut_download=100_000)))
    assert list(store.read_many(["x"])) == [data]
    assert [cut.hits for cut in cuts] == [2, 1, 1]


def test_a_connection_that_is_always_cut_is_one_error(server, store, proxy):
    store.write("x", bytes(3_000_000))
    proxy.fault(Fault("PUT", cut_upload=100_000))
    proxy.fault(Fault("GET", "/x", cut_download=100_000))
    with variables(server.environment(proxy.url, **QUICK)):
        store = Store(store.root)
        with pytest.raises(StorageError, match=r"cannot write s3://.*/y: .*run the same command"):
            store.write("y", bytes(3_000_000))
        with pytest.raises(StorageError, match=r"cannot read s3://.*/x: .*run the same command"):
            store.read("x")


def test_slow_is_not_broken(store, proxy):
    """The limit is on silence: an upload may take far longer than it."""
    store._fs.config_kwargs["read_timeout"] = 3  # instead of 30, to wait less
    proxy.fault(Fault("PUT", upload_rate=3e6))
    proxy.fault(Fault("GET", "/x", times=1, delay_s=2))
    data = os.urandom(20_000_000)
    started = time.monotonic()
    store.write("x", data)
    assert time.monotonic() - started > 5
    assert store.read("x") == data
    assert proxy.count("PUT") == proxy.count("GET", "/x") == 1


@pytest.mark.parametrize("size", [10, 3_000_000, 60_000_000])
def test_a_server_that_says_nothing_is_given_up(server, store, proxy, monkeypatch, size):
    """Be it silent before it takes a body, after it, or in the middle."""
    monkeypatch.setattr(remote, "SILENCE_S", 2)  # instead of 30, to wait less
    proxy.fault(Fault("PUT", delay_s=1000))
    with variables(server.environment(proxy.url, AWS_MAX_ATTEMPTS="1")):
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot write s3://.*/x: .*run the same command"):
            Store(store.root).write("x", bytes(size))
        assert time.monotonic() - started < 20


WRONG = {
    "secret": ({"AWS_SECRET_ACCESS_KEY": f"{SECRET}-not"}, BUCKET, "permission denied"),
    "key": ({"AWS_ACCESS_KEY_ID": "somebody"}, BUCKET, "permission denied"),
    "bucket": ({}, "no-such-bucket", "bucket does not exist; create it, or choose"),
    "server": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, BUCKET, "127.0.0.1:9"),
    "nobody": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, BUCKET, "no credentials"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_without_a_secret(server, what):
    changes, bucket, text = WRONG[what]
    with variables(server.environment(**(QUICK | changes))):
        store = Store(f"s3://{bucket}/pictures")
        calls = {
            "write": lambda: store.write("x", b"1"),
            "read": lambda: store.read("x"),
            "names": lambda: store.names("x"),
            "folders": lambda: store.folders("x"),
            "walk": lambda: list(store.walk("x")),
            "read_many": lambda: list(store.read_many(["x"])),
        }
        for name, call in calls.items():
            with pytest.raises(StorageError, match=text) as error:
                call()
            verb = "write" if name == "write" else "read"
            assert str(error.value).startswith(f"cannot {verb} s3://{bucket}/pictures/x: ")
            assert SECRET not in str(error.value)


@pytest.mark.parametrize("what", ["secret", "bucket", "server"])
def test_status_says_what_is_wrong_in_one_line(server, config, what):
    changes, bucket, text = WRONG[what]
    environment = server.environment(**(QUICK | changes))
    line = one_line(pipeline(environment, "status", config, f"s3://{bucket}/pictures"))
    assert f"s3://{bucket}/pictures" in line
    assert text in line


# --- The commands


def test_every_stage_gives_the_objects_of_a_local_root(proxy, made, local, config):
    assert remote_tree(made) == local
    result = pipeline({}, "run", "encode", config, made)
    assert result.returncode == 0, result.stderr
    assert "0 shards made (0 samples)" in result.stdout
    result = pipeline({}, "status", config, made)
    assert result.returncode == 0, result.stderr
    for group in ("images", "captions/colour", "latents/tiny4/64", "text/tiny-clip"):
        assert group in result.stdout


def test_a_run_on_a_store_that_refuses_data_is_one_error_and_its_rerun_completes(
    server, proxy, local, config
):
    root = f"s3://{BUCKET}/refuses"
    copy_inputs(local, root)
    refuse = proxy.fault(Fault("PUT", r"\.mds", status=503))
    more = ("--workers", "1")
    environment = server.environment(proxy.url, AWS_MAX_ATTEMPTS="1")
    line = one_line(pipeline(environment, "run", "encode", config, root, more=more))
    assert re.search(rf"cannot write {root}/openmoji/(latents|text)/\S+\.mds: .* to write\)", line)
    assert refuse.hits
    assert not [name for name in remote_tree(root) if "/latents/" in name and "commits" in name]
    proxy.heal()
    result = pipeline(environment, "run", "encode", config, root, more=more)
    assert result.returncode == 0, result.stderr
    assert remote_tree(root) == local


def test_a_kill_of_encode_in_mid_upload_and_a_rerun_give_the_same_objects(
    server, proxy, local, config
):
    root = f"s3://{BUCKET}/killed"
    copy_inputs(local, root)
    before = remote_tree(root)
    held = proxy.fault(Fault("PUT", r"/latents/.*00001-.*\.mds", hold_upload=1_000))
    with subprocess.Popen(
        command("run", "encode", config, root),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert held.begun.wait(90)
        os.kill(process.pid, signal.SIGKILL)
    after = remote_tree(root)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if re.search(r"/latents/.*00001", name)]
    proxy.heal()
    result = pipeline({}, "run", "encode", config, root)
    assert result.returncode == 0, result.stderr
    assert remote_tree(root) == local


def test_the_trainer_streams_from_the_store_and_its_checkpoint_paints(proxy, made, tmp_path):
    for name in ("yamls", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    train = [
        *("composer", "training/train.py", "yamls/demo.yaml", f"data.root={made}"),
        *("data.captions=alt:0.5,colour:0.5", "defaults.resolution=64", "defaults.batch_size=4"),
        *("stages.masked.steps=4", "stages.masked.warmup=2", "stages.full.steps=3"),
        "data.workers=2",  # whose clients are not those of the trainer
    ]
    generate = [
        *(sys.executable, "-m", "training.generate", "--checkpoint", "runs/demo"),
        *("--prompts", "avocado on a blue background", "--steps", "3", "--out", "out"),
    ]
    for words in (train, generate):
        result = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
    assert proxy.count("GET", r"/latents/tiny4/64/\d+-\w+\.mds") > 0
    assert (tmp_path / "out/sheet.png").stat().st_size > 1000


# --- The summary of the commits


def test_a_run_leaves_a_summary_of_every_group(proxy, made):
    store = Store(made)
    groups = ["openmoji/images", "openmoji/captions/colour", "openmoji/latents/tiny4/64"]
    for group in groups:
        assert store.exists(f"{group}/{summary.NAME}")
        proxy.heal()
        commits = read_commits(store, group)
        assert len(commits) == len(store.names(f"{group}/commits")) > 1
        assert proxy.count("GET", r"/commits/\d+\.json") == 0


def commit(store: Store, group: str, name: str, value: int = 0) -> None:
    write_shard(store, group, InputShard(name, "train"), {"v": value}, {}, ["k"], [])


def test_status_of_many_commits_reads_no_single_record(store, proxy):
    group = layout.images_group("openmoji")
    for n in range(300):  # not among the names that the source's YAML asks for
        commit(store, group, f"x{n:05d}")
    summary.write(store, group)
    proxy.heal()
    (row,) = [row for row in collect(store.root) if row.samples]  # the others are not begun
    assert (row.samples, row.configured) == (300, True)
    assert proxy.count("GET", r"list-type=2.*images%2Fcommits%2F") == 1
    assert proxy.count("GET", rf"/{summary.NAME}") == 1  # none of groups that are not there
    assert proxy.count("GET", r"/commits/[^?]*json") == 0

    commit(store, group, "x00001", 1)
    commit(store, group, "x00300")
    store.delete(f"{group}/commits/x00002.json")
    proxy.heal()
    found = read_commits(store, group)
    assert found["x00001"].inputs == {"v": 1}
    assert "x00002" not in found
    assert list(found) == sorted(found)
    assert len(found) == 300
    assert proxy.count("GET", r"/commits/[^?]*json") == 2


def test_publishing_reads_every_record_once(store, proxy, local, config):
    group = "openmoji/latents/tiny4/64"
    for name, data in local.items():
        if name.startswith(f"{group}/commits/"):
            store.write(name, data)
    proxy.heal()
    publish(store, group)
    records = proxy.count("GET", r"/commits/[^?]*json")
    assert records == len(store.names(f"{group}/commits")) > 1
    for name in ("index.json", "manifest.json"):
        assert store.read(f"{group}/{name}") == local[f"{group}/{name}"]


def test_a_summary_is_not_trusted(store):
    commit(store, "g", "00000")
    for nonsense in (b"", b"no gzip", b"\x1f\x8b\x08\x00 half"):
        store.write(f"g/{summary.NAME}", nonsense)
        assert list(read_commits(store, "g")) == ["00000"]
    summary.write(store, "g")
    whole = store.read(f"g/{summary.NAME}")
    store.write(f"g/{summary.NAME}", whole[:-20])
    assert list(read_commits(store, "g")) == ["00000"]


def test_a_store_without_versions_reads_every_record():
    store = Store("memory://without-versions")
    for n in range(3):
        commit(store, "g", f"{n:05d}")
    summary.write(store, "g")
    commit(store, "g", "00001", 1)
    assert [c.inputs["v"] for c in read_commits(store, "g").values()] == [0, 1, 0]
    assert [entry.version for entry in store.entries("g/commits")] == [""] * 3

"""`pipeline verify`: every kind of damage, injected for real, is found, named and repaired."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.commands.checks import Problem
from pipeline.commands.verify import repair, select, verify
from pipeline.core.commits import read_commit, read_commits, write_shard
from pipeline.core.errors import SettingError
from pipeline.core.groups import publish
from pipeline.core.mds import decode_shard, encode_shard
from pipeline.core.samples import InputShard, Reject
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet, to_parquet
from pipeline.core.tars import read_samples
from pipeline.engine.plan import Choice
from pipeline.stages.caption import CaptionStage
from pipeline.stages.download import Download
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings
from tests.pipeline.helpers.command import call
from tests.pipeline.helpers.roots import SETTINGS, mds_rows, pictures, run_here, tar_of, tree

IMAGES = "openmoji/images"
CAPTIONS = "openmoji/captions/colour"
LATENTS = "openmoji/latents/tiny4/64"
TEXT = "openmoji/text/tiny-clip/alt-0.5+colour-0.5.trimmed"
STAGES = [
    Download("openmoji", SETTINGS),
    CaptionStage("openmoji", "colour"),
    Encode(
        "openmoji",
        EncodeSettings(
            vae="tiny4",
            text_encoder="tiny-clip",
            resolutions=(64,),
            captions="alt:0.5,colour:0.5",
            text="trimmed",
            batch_size=4,
        ),
    ),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    for stage in STAGES:
        run_here(stage, Store(root))
    return root


@pytest.fixture
def store(sound, tmp_path) -> Store:
    """A copy of the sound root, to be damaged."""
    shutil.copytree(sound, tmp_path / "root")
    return Store(tmp_path / "root")


def found(store: Store, workers: int = 1) -> list[Problem]:
    problems: list[Problem] = []
    verify(store, select(store, None, None), workers, problems.append)
    return problems


def file(store: Store, group: str, ending: str, shard: str = "00000") -> Path:
    commit = read_commit(store, group, shard)
    assert commit is not None
    return Path(store.url(f"{group}/{commit.file(ending)}"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite(
    store: Store, group: str, change: Callable[[dict[str, bytes]], list[str] | None]
) -> None:
    """A shard whose files are wrong, and whose commit record knows it as right."""
    commit = read_commit(store, group, "00000")
    assert commit is not None
    files = {n: store.read(f"{group}/{n}") for n in commit.files if not n.startswith("rejects/")}
    keys = change(files)
    if keys is None:
        keys = from_parquet(files[commit.file(".parquet")])["key"].to_pylist()
    shard = InputShard("00000", commit.split)
    write_shard(store, group, shard, commit.inputs, files, keys, [], commit.index)
    publish(store, group)


def mds(store: Store, group: str, change: Callable[[list[dict]], None]) -> None:
    """Changes the samples of a group's shard, consistently with its commit."""

    def in_files(files: dict[str, bytes]) -> None:
        (name,) = (n for n in files if n.endswith(".mds"))
        header, samples = decode_shard(files[name])
        rows = [{k: _copied(v) for k, v in sample.items()} for sample in samples]
        change(rows)
        columns = dict(zip(header["column_names"], header["column_encodings"], strict=True))
        files[name], _ = encode_shard(columns, rows, name)

    rewrite(store, group, in_files)


def _copied(value):
    return value.copy() if isinstance(value, np.ndarray) else value


def table(files: dict[str, bytes], change: Callable[[list[dict]], None]) -> None:
    (name,) = (n for n in files if n.endswith(".parquet"))
    old = from_parquet(files[name])
    rows = old.to_pylist()
    change(rows)
    files[name] = to_parquet(pa.Table.from_pylist(rows, schema=old.schema))


def flip_latents(store: Store) -> None:
    flip(file(store, LATENTS, ".mds"))


def remove_text(store: Store) -> None:
    file(store, TEXT, ".mds").unlink()


def cut_tar(store: Store) -> None:
    path = file(store, IMAGES, ".tar")
    path.write_bytes(path.read_bytes()[:-700])


def cut_tar_consistently(store: Store) -> None:
    def change(files: dict[str, bytes]) -> None:
        files["00000.tar"] = files["00000.tar"][:1000]

    rewrite(store, IMAGES, change)


def another_picture(store: Store) -> None:
    def change(files: dict[str, bytes]) -> None:
        members = [
            (f"{key}.{extension}", data[:-1] + b"?" if extension == "png" else data)
            for key, fields in read_samples(files["00000.tar"])
            for extension, data in fields.items()
        ]
        files["00000.tar"] = tar_of(members)

    rewrite(store, IMAGES, change)


def another_alt_caption(store: Store) -> None:
    rewrite(store, IMAGES, lambda files: table(files, lambda rows: rows[1].update(caption="a lie")))


def tar_in_another_order(store: Store) -> None:
    def change(files: dict[str, bytes]) -> list[str]:
        samples = list(read_samples(files["00000.tar"]))[::-1]
        files["00000.tar"] = tar_of(
            (f"{key}.{extension}", data)
            for key, fields in samples
            for extension, data in fields.items()
        )
        return [key for key, _ in samples]

    rewrite(store, IMAGES, change)


def caption_of_nothing(store: Store) -> None:
    rewrite(
        store, CAPTIONS, lambda files: table(files, lambda rows: rows[0].update(key="000009999"))
    )


def nan_latent(store: Store) -> None:
    def change(rows: list[dict]) -> None:
        rows[1]["latent"][0, 3, 3] = np.nan

    mds(store, LATENTS, change)


def infinite_token(store: Store) -> None:
    def change(rows: list[dict]) -> None:
        rows[0]["tokens"][1, 5] = np.inf

    mds(store, TEXT, change)


def too_many_tokens(store: Store) -> None:
    def change(rows: list[dict]) -> None:
        rows[0]["tokens"] = np.zeros((33, 128), np.float16)

    mds(store, TEXT, change)


def a_lost_caption(store: Store) -> None:
    mds(store, TEXT, lambda rows: rows.__delitem__(-1))


def latents_in_another_order(store: Store) -> None:
    mds(store, LATENTS, lambda rows: rows.reverse())


def row_out_of_range(store: Store) -> None:
    rewrite(store, TEXT, lambda files: table(files, lambda rows: rows[0].update(row=99)))


def key_in_two_shards(store: Store) -> None:
    """Shard 00001 gets the keys of shard 00000, consistently."""
    commit = read_commit(store, CAPTIONS, "00001")
    assert commit is not None
    other = from_parquet(file(store, CAPTIONS, ".parquet").read_bytes()).slice(0, commit.samples)
    inputs = {**commit.inputs, "images": "made of others"}
    files = {"00001-other.parquet": to_parquet(other)}
    keys = other["key"].to_pylist()
    write_shard(store, CAPTIONS, InputShard("00001", commit.split), inputs, files, keys, [])


def rejects_that_are_not_there(store: Store) -> None:
    commit = read_commit(store, LATENTS, "00000")
    assert commit is not None
    record = store.read_json(f"{LATENTS}/commits/00000.json")
    record["rejects"] = {"undecodable": 2}
    store.write_json(f"{LATENTS}/commits/00000.json", record)


def broken_commit(store: Store) -> None:
    Path(store.url(f"{TEXT}/commits/00001.json")).write_text('{"shard": "000')


def commit_of_another_shard(store: Store) -> None:
    commits = Path(store.url(f"{LATENTS}/commits"))
    shutil.copy(commits / "00000.json", commits / "00001.json")


DAMAGE = [
    (flip_latents, "openmoji/latents/tiny4/64/00000: 00000-", "sha256 differs"),
    (remove_text, "openmoji/text/", ".mds is missing"),
    (cut_tar, "openmoji/images/00000: 00000.tar has", "bytes, its commit says"),
    (cut_tar_consistently, "openmoji/images/00000: cannot be read: ReadError", ""),
    (another_picture, "openmoji/images/00000: sample 000000000: its picture has another", ""),
    (another_alt_caption, "images/00000: sample 000000001: its caption in the tar is not", ""),
    (tar_in_another_order, "images/00000: tar and parquet", "in another order"),
    (caption_of_nothing, "colour/00000: sample 000009999: there is no picture of this key", ""),
    (caption_of_nothing, "colour/00000: sample 000000000: its picture is there", "neither made"),
    (nan_latent, "64/00000: sample 000000001: its latent has values", "NaN"),
    (infinite_token, "trimmed/00000: caption 0 (", "tokens that are no numbers"),
    (too_many_tokens, "trimmed/00000: caption 0 (", "float16 tokens (33, 128); the manifest says"),
    (a_lost_caption, "trimmed/00000:", "rows beyond"),
    (latents_in_another_order, "64/00000: sample 0000000", "not at this place"),
    (row_out_of_range, "trimmed/00000: its keys point at rows beyond", ""),
    (key_in_two_shards, "colour/00001: sample 000000000: its key is also in shard 00000", ""),
    (key_in_two_shards, "colour/00000: sample 000000000: its key is also in shard 00001", ""),
    (rejects_that_are_not_there, "64/00000: no rejects, its commit says 2 undecodable", ""),
    (broken_commit, "trimmed/00001: its commit record is broken", ""),
    (commit_of_another_shard, "64/00001: its commit record is that of shard 00000", ""),
]


def test_a_sound_root_has_no_problem(store):
    seen = []
    groups = select(store, None, None)
    summary = verify(store, groups, 1, seen.append)
    assert seen == []
    assert (summary.groups, summary.shards, summary.samples, summary.problems) == (4, 8, 24, 0)
    committed = (c.bytes() for s, g in groups for c in read_commits(store, f"{s}/{g}").values())
    assert summary.bytes == sum(committed)


@pytest.mark.parametrize(
    ("damage", "start", "end"),
    DAMAGE,
    ids=[f"{d.__name__}-{i}" for i, (d, _, _) in enumerate(DAMAGE)],
)
def test_damage_is_found_named_and_repaired(store, sound, damage, start, end):
    damage(store)
    problems = found(store)
    assert any(start in str(p) and end in str(p) for p in problems), list(map(str, problems))
    assert {p.group for p in problems} == {p.group for p in problems if p.shard}
    files = {name for name in tree(Path(store.root)) if "/commits/" not in name}
    repair(store, problems)
    assert files <= tree(Path(store.root)).keys()  # no data file was deleted
    assert sum(run_here(stage, store) for stage in STAGES) > 0
    assert found(store) == []
    again = tree(Path(store.root))
    assert {name: again[name] for name in tree(sound)} == tree(sound)
    extra = again.keys() - tree(sound).keys()
    assert extra <= {"openmoji/captions/colour/00001-other.parquet"}  # for prune


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("index.json", lambda r: r["shards"].pop() and r["inputs"].pop(), "lacks 1 committed"),
        ("index.json", lambda r: r["shards"].reverse(), "has 2 entries that are not"),
        (
            "index.json",
            lambda r: (r["shards"].reverse(), r["inputs"].reverse()),
            "in another order",
        ),
        ("index.json", lambda r: r["inputs"][0].update(split="heldout"), "has 1 entries that"),
        ("index.json", lambda r: r.pop("inputs"), "index.json is broken"),
        ("index.json", lambda r: r.update(version=1), "has version 1"),
        ("manifest.json", lambda r: r.update(samples=7), "samples is 7, the commits have 6"),
        ("manifest.json", lambda r: r["splits"].update(train=9), "splits is"),
        ("manifest.json", lambda r: r.update(shards=1), "shards is 1, the commits have 2"),
    ],
)
def test_an_edited_index_or_manifest_is_written_anew(store, sound, name, change, what):
    record = store.read_json(f"{LATENTS}/{name}")
    change(record)
    store.write_json(f"{LATENTS}/{name}", record)
    (problem,) = found(store)
    assert str(problem).startswith("openmoji/latents/tiny4/64: ")
    assert what in str(problem)
    repair(store, [problem])
    assert tree(Path(store.root)) == tree(sound)


def test_an_index_that_is_gone_or_cut_off(store, sound):
    Path(store.url(f"{LATENTS}/index.json")).unlink()
    path = Path(store.url(f"{TEXT}/index.json"))
    path.write_bytes(path.read_bytes()[:100])
    problems = found(store)
    assert ["is missing" in str(p) or "is broken" in str(p) for p in problems] == [True, True]
    repair(store, problems)
    assert tree(Path(store.root)) == tree(sound)


def test_a_broken_manifest_is_written_anew_from_the_commits(store, sound):
    manifest = store.read_json(f"{TEXT}/manifest.json")
    store.write_json(f"{TEXT}/manifest.json", {**manifest, "text_encoder": {"name": "x"}})
    Path(store.url(f"{LATENTS}/manifest.json")).unlink()
    problems = found(store)
    texts = list(map(str, problems))
    assert any("manifest.json is missing; `pipeline verify --repair` writes" in t for t in texts)
    assert any("manifest.json is broken (" in t for t in texts)
    flip(file(store, TEXT, ".mds"))
    lines = repair(store, found(store))
    assert lines[0] == f"{LATENTS}: index and manifest were written anew"
    assert "--text-encoder tiny-clip --text trimmed --captions alt:0.5,colour:0.5" in lines[1]
    for stage in STAGES:
        run_here(stage, store)
    assert tree(Path(store.root)) == tree(sound)


def test_a_newer_schema_is_no_damage(store):
    manifest = store.read_json(f"{TEXT}/manifest.json")
    store.write_json(f"{TEXT}/manifest.json", {**manifest, "schema_version": 2})
    with pytest.raises(SettingError, match="upgrade the package"):
        found(store)


def test_rejects_and_empty_shards_are_sound(tmp_path):
    from pipeline.core.samples import ImageRef, ImageSample
    from pipeline.stages.images import write_images

    store = Store(tmp_path)
    good = pictures()
    bad = ImageSample(ImageRef("000010000", "x:", "a ruin"), b"nothing", "png", 1, 1, 1, 1)
    lost = Reject("000000009", "download", "failed_to_download", "404")
    inputs = {"stage": "download"}
    write_images(store, IMAGES, InputShard("00000", "train"), inputs, [*good, lost], 0.0)
    write_images(store, IMAGES, InputShard("00001", "train"), inputs, [bad], 0.0)
    for stage in (
        CaptionStage("openmoji", "colour", max_reject_rate=1.0),
        Encode("openmoji", STAGES[2].settings, max_reject_rate=1.0),
    ):
        run_here(stage, store)
    assert read_commits(store, LATENTS)["00001"].index is None
    assert found(store) == []


def test_compressed_and_hashed_shards(tmp_path, sound):
    shutil.copytree(sound, tmp_path / "root")
    store = Store(tmp_path / "root")
    settings = replace(STAGES[2].settings, compression="zstd:3", hashes=("sha1",))
    run_here(Encode("openmoji", settings), store, Choice(stale=True))
    assert file(store, LATENTS, ".mds.zstd").exists()
    assert found(store) == []
    for commit in (f"{LATENTS}/commits/00000.json", f"{TEXT}/commits/00001.json"):
        record = store.read_json(commit)
        record["index"]["raw_data"]["hashes"]["sha1"] = "0" * 40
        store.write_json(commit, record)
    texts = [str(problem) for problem in found(store)]
    assert sum("its index entry does not describe its MDS shard" in text for text in texts) == 2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda row: row["scales"].__setitem__((0, 1), np.nan), "scales that are negative or no"),
        (lambda row: row["scales"].__setitem__((0, 1), -1), "scales that are negative or no"),
        (
            lambda row: row.update(scales=row["scales"][:, :1]),
            r"float16 scales \(\d+, 1\); its tokens need float16 \(\d+, 2\)",
        ),
        (lambda row: row.update(tokens=np.zeros((3, 64), np.int8)), r"int8 tokens \(3, 64\)"),
    ],
)
def test_int8_text(store, change, what):
    run_here(Encode("openmoji", replace(STAGES[2].settings, text_dtype="int8")), store)
    assert found(store) == []
    mds(store, f"{TEXT}.int8", lambda rows: change(rows[0]))
    assert any(re.search(what, str(problem)) for problem in found(store))


def test_processes_find_the_same(store):
    nan_latent(store)
    flip(file(store, IMAGES, ".tar"))
    assert sorted(map(str, found(store, workers=2))) == sorted(map(str, found(store)))


def test_a_group_that_a_run_holds_is_not_compared_with_its_index(store):
    store.delete(f"{LATENTS}/index.json")
    store.write_json(f"{LATENTS}/leases/elsewhere-1-2.json", {"command": "x", "counter": 1})
    notes: list[str] = []
    problems: list[Problem] = []
    verify(store, select(store, None, None), 1, problems.append, note=notes.append)
    assert problems == []
    assert "a run holds it" in notes[0]


def test_decode_reads_what_streaming_reads(store):
    for group in (LATENTS, TEXT):
        rows = []
        for commit in read_commits(store, group).values():
            _, samples = decode_shard(store.read(f"{group}/{commit.file('.mds')}"))
            rows += list(samples)
        expected = mds_rows(store, group)
        assert len(rows) == len(expected)
        for row, other in zip(rows, expected, strict=True):
            assert row.keys() == other.keys()
            for name in row:
                np.testing.assert_array_equal(row[name], other[name])


def test_no_cut_of_an_mds_shard_is_read_as_one(store):
    data = file(store, TEXT, ".mds").read_bytes()
    for length in [*range(0, 700, 7), len(data) - 1]:
        with pytest.raises(ValueError, match=r"MDS shard|cut off|offsets|JSON|Expecting"):
            decode_shard(data[:length])


def test_the_command(monkeypatch, capsys, store, sound):
    root = ["--root", store.root, "--workers", "1"]
    code, out, _ = call(monkeypatch, capsys, "verify", *root)
    assert (code, out.count("\n")) == (0, 1)
    assert out.startswith("verify: 4 groups, 8 shards, 24 samples, ")
    assert ", 0 problems, " in out
    flip_latents(store)
    code, out, _ = call(monkeypatch, capsys, "verify", *root, "--group", "images")
    assert (code, out[:34]) == (0, "verify: 1 groups, 2 shards, 6 samp")
    code, out, _ = call(monkeypatch, capsys, "verify", *root)
    assert code == 1
    assert out.startswith("openmoji/latents/tiny4/64/00000: 00000-")
    code, out, _ = call(monkeypatch, capsys, "verify", *root, "--json")
    assert code == 1
    record = json.loads(out)
    assert (record["problems"][0]["shard"], record["summary"]["problems"]) == ("00000", 1)
    code, out, _ = call(monkeypatch, capsys, "verify", *root, "--repair")
    assert code == 1
    assert "repair: openmoji/latents/tiny4/64: 1 shards are left to do again" in out
    assert "run again what made it, e.g. `pipeline run encode --root" in out
    assert not (Path(store.root) / LATENTS / "leases").exists()
    run_here(STAGES[2], store)
    code, out, _ = call(monkeypatch, capsys, "verify", *root, "--repair")
    assert code == 0
    assert tree(Path(store.root)) == tree(sound)


def test_repair_refuses_while_a_run_holds_a_group(monkeypatch, capsys, store):
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        from pipeline.core import process

        me = process.identity(holder.pid)
        record = {"owner": me, "command": "pipeline run encode", "counter": 1}
        store.write_json(f"{LATENTS}/leases/{me}.json", record)
        code, _, err = call(monkeypatch, capsys, "verify", "--root", store.root, "--repair")
        assert code == 2
        assert f"is being written by process {holder.pid}" in err
        assert call(monkeypatch, capsys, "verify", "--root", store.root, "--workers", "1")[0] == 0
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "openmojy"], 'did you mean "openmoji"'),
        (["--group", "latents/tiny4/65"], 'did you mean "latents/tiny4/64"'),
        (["--workers", "0"], "--workers"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(monkeypatch, capsys, store, arguments, message):
    code, out, err = call(monkeypatch, capsys, "verify", "--root", store.root, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_root_that_is_not_there(monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, "verify", "--root", str(tmp_path / "nothing"))
    assert code == 2
    assert "nothing there" in err


KILLED = """
import os, time
from pipeline.engine.processes import Processes

def pid(_):
    time.sleep(0.05)
    return os.getpid()

if __name__ == "__main__":
    with Processes(2) as run:
        print(*set(run(pid, range(8))), flush=True)
        time.sleep(60)
"""


def test_no_process_outlives_a_killed_verify(tmp_path):
    """Its processes watch their parent, for nobody tells them when it is killed."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children
    assert not any(map(_alive, children))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

"""`pipeline drop --purge`: from every group, page and list; `verify --dropped` proves it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.verify import select, verify
from pipeline.core import drops, failures, layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import Commit, read_commit, read_commits
from pipeline.core.drops import link_hash
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.dropping import traces
from pipeline.dropping.drop import drop
from pipeline.dropping.purge import purge
from pipeline.engine.plan import Choice, plan
from pipeline.engine.report import Report
from pipeline.official.exporter import Export
from pipeline.official.groups import ExportSettings
from pipeline.sources.openmoji import OpenMoji
from pipeline.sources.urls import Urls
from pipeline.stages.caption import CaptionStage
from pipeline.stages.download import Download
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings
from tests.pipeline.helpers import roots
from tests.pipeline.helpers.command import call
from tests.pipeline.helpers.roots import run_here, tree

SOURCE = OpenMoji(glyphs="avocado;rocket;red heart", backgrounds="blue,red,green", size=64)
GONE = {"00000": frozenset({"000000001", "000000003"}), "00001": frozenset({"000010000"})}
KEYS = sorted(key for keys in GONE.values() for key in keys)
VAES = ("tiny4", "tiny16")
MIX = "alt:0.5,colour:0.5"
IMAGES = "openmoji/images"


def stages(store: Store) -> list:
    common: dict[str, Any] = {"text_encoder": "tiny-clip", "resolutions": (64,)}
    packed: dict[str, Any] = {"text": "trimmed", "text_dtype": "int8", "compression": "zstd"}
    encoded = [
        Encode("openmoji", EncodeSettings(vae="tiny4", captions="alt", text="full", **common)),
        Encode("openmoji", EncodeSettings(vae="tiny16", captions=MIX, **common, **packed)),
    ]
    return [Download("openmoji", SOURCE), CaptionStage("openmoji", "colour"), *encoded]


def export(store: Store) -> Export:
    return Export(store, "openmoji", ExportSettings("tiny4", "tiny-clip", (64,)))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """All kinds of groups, two encoders of each kind, a page, a report and a failure that name
    keys, and what a redone shard replaced."""
    root = tmp_path_factory.mktemp("purge") / "root"
    store = Store(root)
    for stage in stages(store):
        run_here(stage, store)
    run_here(export(store), store)
    older = CaptionStage("openmoji", "colour", clean="lower")
    run_here(older, store)
    report = Report("caption", "openmoji")
    report.fail("00000", f"TooManyRejects: e.g. {KEYS[0]}: broken")
    path = report.write(store)
    store.write(path.replace(".json", ".html"), older.page(store, report.counters, 1.0).encode())
    failures.record(store, [IMAGES], "00007", f"of {KEYS[0]}", 3)
    store.write(f"{IMAGES}/00000-0123456789abcdef.tar", b"superseded")
    return root


@pytest.fixture
def store(made, tmp_path) -> Store:
    shutil.copytree(made, tmp_path / "root")
    return Store(tmp_path / "root")


def problems(store: Store) -> list[str]:
    found = []
    verify(store, select(store, None, None), 1, found.append)
    return list(map(str, found))


def purged(store: Store, source: str = "openmoji") -> dict[str, int]:
    found = purge(store, source, traces.learn(store, source))
    assert found.broken == {}
    return dict(found.removed)


def left(store: Store, source: str = "openmoji") -> list[str]:
    return list(map(str, traces.find(store, source, traces.learn(store, source))))


def test_nothing_is_left_anywhere(monkeypatch, capsys, tmp_path, store):
    root = ["--root", store.root]
    kept = {key for key in _keys(store, IMAGES) if key not in KEYS}
    gone = [row["url"] for row in _rows(store, IMAGES) if row["key"] in KEYS]
    before = tree(Path(store.root))
    assert call(monkeypatch, capsys, "verify", "--dropped", *root)[0] == 0
    (tmp_path / "list.txt").write_text("\n".join(KEYS))
    assert call(monkeypatch, capsys, "drop", "--keys", str(tmp_path / "list.txt"), *root)[0] == 0
    code, out, _ = call(monkeypatch, capsys, "verify", "--dropped", *root)
    places = len(out.splitlines()) - 1
    assert (code, out.splitlines()[-1]) == (
        1,
        f"verify --dropped: 3 dropped samples of 1 sources: left in {places} places; "
        "`pipeline drop --purge` removes them",
    )
    for dry in ([], ["--dry-run"]):
        code, out, _ = call(monkeypatch, capsys, "drop", "--purge", *dry, *root)
        assert (code, len(out.splitlines())) == (0, places + 1)
        assert f"{IMAGES}/00000.tar: 2 dropped samples\n" in out
        assert ".html: 3 dropped samples on a page" in out
        assert f"{IMAGES}: 1 superseded files, which may hold some\n" in out
        assert out.endswith("nothing was removed; --yes removes them\n")
        now = {n: data for n, data in tree(Path(store.root)).items() if "/drops/" not in n}
        assert now == before

    code, out, err = call(monkeypatch, capsys, "drop", "--purge", "--yes", *root)
    assert (code, err) == (0, "")
    assert "openmoji: removed 3 samples of openmoji/latents/tiny16/64\n" in out
    assert out.endswith("purge: nothing is left of any dropped sample\n")
    assert call(monkeypatch, capsys, "verify", "--dropped", *root)[1] == (
        "verify --dropped: 3 dropped samples of 1 sources: nothing is left of them\n"
    )
    assert problems(store) == []
    for path in Path(store.root).rglob("*"):
        if path.is_file() and path.parent.name != "drops":
            data = path.read_bytes()
            # In a tar with its extension: the sizes there are octal digits too.
            end = "." if path.suffix == ".tar" else ""
            assert not [text for text in (*KEYS, *gone) if f"{text}{end}".encode() in data], path
    groups = [g for _, g in select(store, None, None)]
    assert len(groups) == 8
    for group in groups:
        train = {key for key in kept if key < "00001"}  # an export is of one split
        found = _keys(store, f"openmoji/{group}")
        assert found == (train if group.startswith("official") else kept)
    # Nothing is stale, and nothing is to be done again.
    for stage in [*stages(store), export(store)]:
        todo = plan(stage, Catalog(store))
        assert (todo.stale.total(), todo.pending) == (0, {})
    code, out, _ = call(monkeypatch, capsys, "drop", "--purge", "--yes", *root)
    assert (code, out) == (0, "purge: nothing is left of any dropped sample\n")


def test_it_holds_what_the_stages_would_have_made(store):
    drops.add(store, "openmoji", {shard: sorted(keys) for shard, keys in GONE.items()})
    redone = Store(f"{store.root}-redone")
    shutil.copytree(store.root, redone.root)
    for stage in stages(redone):
        run_here(stage, redone, Choice(stale=True))
    run_here(export(redone), redone, Choice(stale=True))
    purged(store)
    for stage in [*stages(store), export(store)]:
        for group in stage.groups():
            one, other = (read_commits(s, group) for s in (store, redone))
            assert _facts(one) == _facts(other)
            if group.split("/")[1] in ("images", "captions"):
                assert _rows(store, group) == _rows(redone, group)
    one, other = (read_commits(s, IMAGES)["00000"] for s in (store, redone))
    assert one.files[one.file(".tar")] == other.files[other.file(".tar")]
    captions = {row["caption"] for row in roots.mds_rows(store, _text("alt", "full"))}
    assert captions == {row["caption"] for row in _rows(store, IMAGES)}


def test_training_goes_on(store, tmp_path):
    from tests.pipeline.dropping.test_drop import scored, streamed

    def kept() -> list[str]:
        return sorted(row["key"] for row in _rows(store, IMAGES, "00000") if row["key"] not in KEYS)

    run_here(
        Encode("openmoji", EncodeSettings("tiny4", "tiny-clip", (64,), "alt", "trimmed")), store
    )
    drop(store, "openmoji", KEYS, "key")
    assert streamed(store, tmp_path / "before") == kept()
    purged(store)
    assert streamed(store, tmp_path / "after") == kept()
    assert scored(store) == len(kept())


def test_a_shard_that_is_dropped_whole(store):
    keys = [row["key"] for row in _rows(store, IMAGES, "00001")]
    drop(store, "openmoji", keys, "key")
    purged(store)
    assert left(store) == problems(store) == []
    assert [c.samples for c in read_commits(store, "openmoji/latents/tiny4/64").values()][1] == 0


def test_rejects_that_name_a_dropped_sample(tmp_path):
    """A duplicate's reject says of what: the name goes, the reject stays."""
    from pipeline.core.samples import ImageRef, ImageSample, InputShard, Reject
    from pipeline.stages.images import write_images

    store = Store(tmp_path)
    data = roots.pictures(SOURCE)[0].data
    items = [
        ImageSample(ImageRef("000000000", "http://h/0", "x"), data, "png", 64, 64, 64, 64),
        Reject("000000001", "download", "duplicate", "the same picture as 000000000"),
        Reject(
            "000000002", "download", "undecodable", "no picture", ImageRef("", "http://h/2", "")
        ),
    ]
    write_images(store, IMAGES, InputShard("00000", "train"), {"stage": "x"}, items, 0.0)
    drop(store, "openmoji", ["000000000", "000000002"], "key")
    assert left(store)
    purged(store)
    assert left(store) == problems(store) == []
    commit = read_commit(store, IMAGES, "00000")
    assert commit is not None
    assert (commit.samples, commit.rejects) == (0, {"duplicate": 1})
    record = store.read_json(f"{IMAGES}/commits/00000.json")
    assert "reads_as" not in record  # of a version that knows it
    (row,) = _rows(store, IMAGES, "00000", "all")
    assert row["error_message"] == "the same picture as (dropped)"
    stem = commit.file(".tar").removesuffix(".tar")
    assert store.read_json(f"{IMAGES}/{stem}_stats.json")["count"] == 1


def test_lists_of_links(tmp_path, monkeypatch, capsys):
    """A row that is taken down is emptied in place: the shard is not stale, keys stay, and reading
    the list again brings nothing back."""
    from tests.pipeline.helpers.web import serving
    from tests.pipeline.sources.test_urls import photo

    with serving() as web:
        links = [web.add(f"/{n}.jpg", photo(n)) for n in range(6)]
        table = tmp_path / "list.csv"
        table.write_text("url,caption\n" + "".join(f"{link},x\n" for link in links))
        store = Store(tmp_path / "root")

        def stage() -> Download:
            settings = {"url_list": str(table), "number_sample_per_shard": 2, "retries": 0}
            made = Urls.model_validate({**settings, "allow_private_hosts": True, "host_rate": 0})
            return Download("urls", made)

        run_here(stage(), store)
        shutil.rmtree(store.url("urls/images/commits/00002.json"), ignore_errors=True)
        Path(store.url("urls/images/commits/00002.json")).unlink()  # not downloaded yet
        (tmp_path / "down.txt").write_text(f"{links[1].upper()}\n{links[1]}#x\n{links[4]}\n")
        root = ["--root", store.root]
        down = ["--urls", str(tmp_path / "down.txt"), "--purge", "--yes"]
        code, out, _ = call(monkeypatch, capsys, "drop", *down, *root)
        assert code == 1  # the path of a link has case
        assert "1 samples of 1 shards are out now (00000: 1)" in out
        assert "1 links are not downloaded yet" in out
        assert "removed 2 links of urls/lists" in out
        assert out.endswith("purge: nothing is left of any dropped sample\n")
        for path in Path(store.root).rglob("*.parquet"):
            urls = str(from_parquet(path.read_bytes()))
            assert links[1] not in urls
            assert links[4] not in urls
        web.hits.clear()
        todo = plan(stage(), Catalog(store))
        assert (todo.stale.total(), list(todo.pending)) == (0, ["00002"])
        run_here(stage(), store)
        assert web.count("/4.jpg") == 0
        assert [row["key"] for row in _rows(store, "urls/images", "00002")] == ["000020001"]
        # The list is read anew, as it says.
        table.write_text(table.read_text() + f"{links[0]}?again,x\n")
        assert len(list(stage().plan(Catalog(store)))) == 4
        assert left(store, "urls") == []
        (tmp_path / "down.txt").write_text(f"{links[1]}\n")
        assert call(monkeypatch, capsys, "drop", *down[:2], *root)[0] == 0


def test_a_link_that_was_taken_down_is_not_fetched(tmp_path, monkeypatch, capsys):
    """Also before a purge, and where it stands again in a shard that is not there yet."""
    from tests.pipeline.helpers.web import serving
    from tests.pipeline.sources.test_urls import photo

    with serving() as web:
        links = [web.add(f"/{n}.jpg", photo(n)) for n in range(5)]
        table = tmp_path / "list.csv"
        table.write_text("url,caption\n" + "".join(f"{link},x\n" for link in [*links, links[0]]))
        store = Store(tmp_path / "root")
        settings = {"url_list": str(table), "number_sample_per_shard": 2, "retries": 0}
        made = Urls.model_validate({**settings, "allow_private_hosts": True, "host_rate": 0})
        run_here(Download("urls", made), store)
        for shard in ("00001", "00002"):
            Path(store.url(f"urls/images/commits/{shard}.json")).unlink()  # not downloaded yet
        (tmp_path / "down.txt").write_text(f"{links[0]}\n{links[2]}#x\n")
        down = ["--urls", str(tmp_path / "down.txt"), "--root", store.root]
        assert call(monkeypatch, capsys, "drop", *down)[0] == 0
        web.hits.clear()
        run_here(Download("urls", made), store)
        assert (web.count("/0.jpg"), web.count("/2.jpg")) == (0, 0)
        assert (web.count("/3.jpg"), web.count("/4.jpg")) == (1, 1)


def test_a_link_that_came_back_goes_again(store):
    url = _rows(store, IMAGES, "00000")[1]["url"]
    drops.add(store, "openmoji", {}, [link_hash(url)])
    assert traces.learn(store, "openmoji").keys == {"00000": {"000000001"}}
    purged(store)
    assert left(store) == []
    assert drops.read(store, "openmoji") == {"00000": {"000000001"}}


def test_a_broken_shard_is_named_and_the_others_are_purged(store, monkeypatch, capsys):
    drop(store, "openmoji", KEYS, "key")
    Path(store.url(f"{IMAGES}/00000.tar")).write_bytes(b"x")
    code, out, err = call(monkeypatch, capsys, "drop", "--purge", "--yes", "--root", store.root)
    assert code == 1
    assert "not purged: shard openmoji/00000: " in out
    assert "pipeline verify --repair" in out
    assert err.count("\n") == 1
    assert not _keys(store, "openmoji/latents/tiny4/64", "00001") & set(KEYS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["drop", "--yes"], "--yes: only with --purge"),
        (["drop", "--purge", "--yes", "--dry-run"], "either --yes or --dry-run"),
        (["verify", "--dropped", "--repair"], "takes --root and --source"),
    ],
)
def test_bad_options(monkeypatch, capsys, tmp_path, arguments, message):
    code, out, err = call(monkeypatch, capsys, *arguments, "--root", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_at_any_change_and_a_rerun_give_the_same_tree(store, tmp_path, step):
    drop(store, "openmoji", ["000000001"], "key")
    begin = Path(store.root)
    whole = tmp_path / "whole"
    shutil.copytree(begin, whole)
    changes = _die_at(None, lambda: purged(Store(whole)))
    expected = tree(whole)
    assert changes > 40
    for number in range(0, changes, step):
        root = tmp_path / f"{number}"
        shutil.copytree(begin, root, copy_function=os.link)
        _die_at(number, lambda root=root: purged(Store(root)))
        purged(Store(root))
        found = tree(root)
        assert found.keys() == expected.keys(), f"change {number}"
        assert found == expected, f"change {number}"
        assert left(Store(root)) == []
        shutil.rmtree(root)


def _die_at(number: int | None, run: Callable[[], object]) -> int:
    """Runs in a child that dies before this change of the file system; how many there are."""
    names = ("replace", "unlink")
    child = os.fork()
    if child == 0:
        count = 0

        def dying(real):
            def change(*arguments, **more):
                nonlocal count
                if count == number:
                    os._exit(200)
                count += 1
                return real(*arguments, **more)

            return change

        for name in names:
            setattr(os, name, dying(getattr(os, name)))
        try:
            run()
            os._exit(min(count, 199))
        finally:
            os._exit(201)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == 200 if number is not None else code < 200
    return code


def _facts(commits: dict[str, Commit]) -> list[tuple]:
    return [(c.shard, c.split, c.samples, c.keys_sha256, c.rejects) for c in commits.values()]


def _text(captions: str, mode: str) -> str:
    return layout.text_group("openmoji", "tiny-clip", captions, mode)


def _rows(store: Store, group: str, shard: str = "", which: str = "good") -> list[dict]:
    found = []
    for name, commit in read_commits(store, group).items():
        if name == (shard or name):
            rows = from_parquet(store.read(f"{group}/{commit.file('.parquet')}")).to_pylist()
            found += [r for r in rows if which == "all" or r.get("status", "success") == "success"]
    return found


def _keys(store: Store, group: str, shard: str = "") -> set[str]:
    return {row["key"] for row in _rows(store, group, shard)}


@pytest.mark.slow
def test_on_s3(made, monkeypatch, capsys, tmp_path):
    from tests.pipeline.helpers.s3 import BUCKET, S3Server, variables

    with S3Server(tmp_path / "s3") as server, variables(server.environment()):
        root = ["--root", f"s3://{BUCKET}/deep/root"]
        store = Store(root[1])
        for path in made.rglob("*"):
            if path.is_file():
                store.write(str(path.relative_to(made)), path.read_bytes())
        (tmp_path / "list.txt").write_text("\n".join(KEYS))
        arguments = ["drop", "--keys", str(tmp_path / "list.txt"), "--purge", "--yes", *root]
        assert call(monkeypatch, capsys, *arguments)[0] == 0
        assert call(monkeypatch, capsys, "verify", "--dropped", *root)[0] == 0
        assert problems(store) == []
        assert json.loads(store.read("openmoji/latents/tiny4/64/manifest.json"))["samples"]

"""`pipeline drop`: out of training at once, out of every file after a redo."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.commands.checks import Problem
from pipeline.commands.verify import select, verify
from pipeline.core import drops, layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import read_commit, read_commits
from pipeline.core.samples import ImageRef, ImageSample, InputShard
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.core.tars import read_samples
from pipeline.dropping.drop import drop, read_list
from pipeline.engine.plan import Choice, plan
from pipeline.sources.openmoji import OpenMoji
from pipeline.stages.caption import CaptionStage
from pipeline.stages.download import Download
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings
from pipeline.stages.images import write_images
from tests.pipeline.helpers.command import call
from tests.pipeline.helpers.roots import SETTINGS, mds_rows, pictures, run_here

IMAGES = "openmoji/images"
CAPTIONS = "openmoji/captions/colour"
LATENTS = "openmoji/latents/tiny4/64"
TEXT = layout.text_group("openmoji", "tiny-clip", "alt", "trimmed")
SOURCE = SETTINGS.model_copy(update={"backgrounds": "blue,red,green"})


def stages() -> list:
    settings = EncodeSettings("tiny4", "tiny-clip", (64,), "alt", "trimmed", batch_size=4)
    return [
        Download("openmoji", SOURCE),
        CaptionStage("openmoji", "colour"),
        Encode("openmoji", settings),
    ]


@pytest.fixture
def store(tmp_path) -> Store:
    """Training shard 00000 and held-out shard 00001, downloaded, captioned and encoded."""
    store = Store(tmp_path / "root")
    for stage in stages():
        run_here(stage, store)
    return store


def rows(store: Store, group: str, shard: str = "00000") -> list[dict]:
    commit = read_commit(store, group, shard)
    assert commit is not None
    return from_parquet(store.read(f"{group}/{commit.file('.parquet')}")).to_pylist()


def test_by_key_and_by_url(monkeypatch, capsys, tmp_path, downloaded):
    root = ["--root", downloaded.root]
    list_ = tmp_path / "list.txt"
    list_.write_text(
        "# asked for by a rights holder\n000000001\n\n000009999  # no such\n000010000\n"
    )
    code, out, _ = call(monkeypatch, capsys, "drop", "--keys", str(list_), *root)
    assert code == 1
    lines = out.splitlines()
    assert lines[0] == (
        "openmoji: 2 samples of 2 shards are out now (00000: 1, 00001: 1), 0 were out already"
    )
    assert "pipeline run all --source openmoji --stale" in lines[1]
    assert "pipeline prune --source openmoji" in lines[1]
    assert "pipeline drop --purge --source openmoji" in lines[1]
    assert lines[2:] == ["in no shard: 000009999; nearest: 000000004 of openmoji"]
    assert drops.read(downloaded, "openmoji") == {
        "00000": {"000000001"},
        "00001": {"000010000"},
    }
    urls = [row["url"] for row in rows(downloaded, IMAGES)]
    stdin = io.TextIOWrapper(io.BytesIO(f"{urls[0]}\n{urls[1]}\n".encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    code, out, _ = call(monkeypatch, capsys, "drop", "--urls", "-", *root)
    assert code == 0
    assert "1 samples of 1 shards are out now (00000: 1), 1 were out already" in out
    assert drops.read(downloaded, "openmoji")["00000"] == {"000000000", "000000001"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--keys FILE or --urls FILE"),
        (["--keys", "a", "--urls", "b"], "--keys FILE or --urls FILE"),
        (["--keys", "/nowhere"], "cannot be read"),
        (["--keys", "/dev/null"], "names nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(monkeypatch, capsys, downloaded, arguments, message):
    code, out, err = call(monkeypatch, capsys, "drop", "--root", downloaded.root, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_keys_of_several_sources_need_its_name(monkeypatch, capsys, tmp_path, downloaded):
    (tmp_path / "root" / "openmoji").rename(tmp_path / "root" / "more")
    run_here(Download("openmoji", SETTINGS), downloaded)
    list_ = tmp_path / "list.txt"
    list_.write_text("000000001")
    root = ["--root", downloaded.root, "--keys", str(list_)]
    code, _, err = call(monkeypatch, capsys, "drop", *root)
    assert code == 2
    assert "--source, there are: more, openmoji" in err
    assert call(monkeypatch, capsys, "drop", *root, "--source", "more")[0] == 0
    assert drops.read(downloaded, "openmoji") == {}
    assert drops.read(downloaded, "more") == {"00000": {"000000001"}}


def test_a_list_is_read_a_line_an_entry():
    lines = ["a", " b ", "#c", "", "http://x/y#z", "d # why", "a"]
    assert read_list(lines) == ["a", "b", "http://x/y#z", "d"]
    assert read_list(["\ufeff# why", "\ufeff\u00a0a\u3000", "b\t# why", "\u200b"]) == ["a", "b"]


def test_keys_are_found_when_pictures_are_gone(store):
    import shutil

    shutil.rmtree(store.url(IMAGES))
    found = drop(store, "openmoji", ["000000001", "000010000", "x"], "key")
    assert found.new == {"00000": {"000000001"}, "00001": {"000010000"}}
    assert found.matched == {"000000001", "000010000"}


def test_keys_that_do_not_begin_with_their_shard(tmp_path):
    store = Store(tmp_path)
    picture = pictures(SOURCE)[0]
    for shard, key in (("00000", "apple"), ("00001", "00000-pear")):
        ref = ImageRef(key, f"http://example.org/{key}", "fruit")
        sample = ImageSample(ref, picture.data, "png", 64, 64, 64, 64)
        write_images(store, IMAGES, InputShard(shard, "train"), {}, [sample], 0.0)
    seen = []
    found = drop(
        store, "openmoji", ["00000-pear", "apple"], "key", lambda *count: seen.append(count)
    )
    assert found.new == {"00000": {"apple"}, "00001": {"00000-pear"}}
    assert seen == [(1, 2), (2, 2)]


LINKS = {
    "000000000": "http://Example.org:80/a%20b.jpg",
    "000000001": " https://b\u00fccher.example/\u00e4.jpg\u00a0",  # of an older version: as it came
    "000000002": "http://example.org/other.jpg?size=1",
    "000000003": "dogs/Cafe\u0301.jpg",
}


@pytest.fixture
def linked(tmp_path) -> Store:
    """Pictures whose links are spelt in several ways."""
    store = Store(tmp_path / "root")
    data = pictures(SOURCE)[0].data
    samples = [
        ImageSample(ImageRef(key, link, "x"), data, "png", 64, 64, 64, 64)
        for key, link in LINKS.items()
    ]
    write_images(store, IMAGES, InputShard("00000", "train"), {}, samples, 0.0)
    return store


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ("\ufeffHTTP://EXAMPLE.ORG/a b.jpg", "000000000"),
        ("http://example.org/x/../a%20b.jpg#top", "000000000"),
        ("https://xn--bcher-kva.example:443/%C3%A4.jpg", "000000001"),
        ("https://B\u00dcCHER.example/a\u0308.jpg", "000000001"),
        ("http://example.org/other.jpg?siz%65=1", "000000002"),
        ("dogs/Caf\u00e9.jpg", "000000003"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_another_spelling_of_a_link(monkeypatch, capsys, tmp_path, linked, entry, key, encoding):
    path = tmp_path / "list.txt"
    path.write_text(f"{entry}\r\n", encoding=encoding)
    code, _, _ = call(monkeypatch, capsys, "drop", "--urls", str(path), "--root", linked.root)
    assert (code, drops.read(linked, "openmoji")) == (0, {"00000": {key}})
    assert drops.read_links(linked, "openmoji") == {drops.link_hash(LINKS[key])}


def test_what_is_not_found_says_what_comes_nearest(monkeypatch, capsys, tmp_path, linked):
    path = tmp_path / "list.txt"
    entries = [
        "https://www.example.org/other.jpg?size=1",
        "http://example.org/other.jpeg?size=1",
        "http://nowhere.test/zzz",
    ]
    path.write_text("\n".join(entries))
    code, out, _ = call(monkeypatch, capsys, "drop", "--urls", str(path), "--root", linked.root)
    near = f"nearest: {LINKS['000000002']}, key 000000002 of openmoji"
    assert code == 1
    assert out.splitlines()[1:] == [
        f"in no shard: {entries[0]}; {near}",
        f"in no shard: {entries[1]}; {near}",
        f"in no shard: {entries[2]}; no url comes near it",
    ]
    path.write_text("\ufeff 000000002.jpg\n000000002\u200b")
    code, out, _ = call(monkeypatch, capsys, "drop", "--keys", str(path), "--root", linked.root)
    assert drops.read(linked, "openmoji") == {"00000": {"000000002"}}
    assert (code, out.splitlines()[-1]) == (
        1,
        "in no shard: 000000002.jpg; nearest: 000000002 of openmoji",
    )


def test_from_the_list_to_the_last_byte(monkeypatch, capsys, tmp_path, store):
    gone = ["000000001", "000000003"]
    urls = {row["key"]: row["url"] for row in rows(store, IMAGES)}
    before = {group: len(read_commits(store, group)) for group in (IMAGES, CAPTIONS, LATENTS, TEXT)}
    list_ = tmp_path / "list.txt"
    list_.write_text("\n".join(gone))
    assert call(monkeypatch, capsys, "drop", "--keys", str(list_), "--root", store.root)[0] == 0

    # At once: training does not stream them, and every other picture once an epoch.
    kept = sorted(urls.keys() - set(gone))
    assert streamed(store, tmp_path) == kept
    assert scored(store) == len(kept)
    # What is still there is sound: a drop is no damage.
    assert problems(store) == []

    # Links may be dead by the time of a takedown: the other pictures come from the tar.
    monkeypatch.setattr(OpenMoji, "fetch", lambda *_: pytest.fail("fetched again"))
    for stage in stages():
        todo = plan(stage, Catalog(store))
        if stage.name == "download":
            assert set(todo.stale) == {"samples were dropped"}
        assert all("samples were dropped" in why for why in todo.stale)
        assert todo.stale.total() == len(stage.groups())  # of one shard in each group
        assert run_here(stage, store) == 0
        assert run_here(stage, store, Choice(stale=True)) == 1
        assert plan(stage, Catalog(store)).stale.total() == 0

    commit = read_commit(store, IMAGES, "00000")
    assert commit is not None
    tar = store.read(f"{IMAGES}/{commit.file('.tar')}")
    assert [key for key, _ in read_samples(tar)] == kept
    for group in (IMAGES, CAPTIONS, LATENTS, TEXT):
        assert sorted(row["key"] for row in rows(store, group)) == kept
        assert len(read_commits(store, group)) == before[group]
    assert not set(gone) & {row["key"] for row in mds_rows(store, LATENTS)}
    captions = {row["caption"] for row in mds_rows(store, TEXT)}
    expected = {
        row["caption"] for shard in ("00000", "00001") for row in rows(store, IMAGES, shard)
    }
    assert captions == expected
    assert streamed(store, tmp_path) == kept
    assert scored(store) == len(kept)
    assert problems(store) == []

    # The same list again: nothing is new, nothing is unknown.
    code, out, _ = call(monkeypatch, capsys, "drop", "--keys", str(list_), "--root", store.root)
    assert code == 0
    assert "0 samples of 0 shards are out now, 2 were out already" in out

    code, out, _ = call(monkeypatch, capsys, "prune", "--root", store.root, "--yes")
    assert code == 0
    assert "freed: " in out
    everything = [
        p for p in Path(store.root).rglob("*") if p.suffix in (".tar", ".parquet", ".mds")
    ]
    for path in everything:  # in a tar with its extension: the sizes there are octal digits too
        end = "." if path.suffix == ".tar" else ""
        data = path.read_bytes()
        assert not [key for key in gone if f"{key}{end}".encode() in data], path
    assert len(everything) == 2 * 2 + 2 + 2 * 2 + 2 * 2  # of two shards in each group
    assert problems(store) == []
    assert streamed(store, tmp_path) == kept


def test_a_shard_that_is_dropped_whole(store):
    keys = [row["key"] for row in rows(store, IMAGES, "00001")]
    drop(store, "openmoji", keys, "key")
    for stage in stages():
        assert run_here(stage, store, Choice(stale=True)) == 1
    assert problems(store) == []
    assert [c.samples for c in read_commits(store, LATENTS).values()][1] == 0
    index = store.read_json(f"{LATENTS}/index.json")
    assert [record["shard"] for record in index["inputs"]] == ["00000"]


def problems(store: Store) -> list[str]:
    found: list[Problem] = []
    verify(store, select(store, None, None), 1, found.append)
    return list(map(str, found))


def streamed(store: Store, folder: Path) -> list[str]:
    """The keys that training sees in one epoch."""
    from tests.training.helpers.groups import SHIPPED, settings
    from training.config.load import resolve
    from training.data.loader import make_dataset
    from training.run.preflight import check

    raw = settings(Path(store.root), SHIPPED, folder / "run")
    raw["data"] |= {"sources": ["openmoji"]}
    raw["defaults"]["batch_size"] = 1
    return sorted(sample["key"] for sample in make_dataset(check(resolve(raw)), "masked"))


def scored(store: Store) -> int:
    """How many training pictures `training.scores` shows."""
    from training.scores import read_examples

    metadata = SimpleNamespace(
        config={"data": {"root": store.root, "sources": ["openmoji"], "split": "train"}},
        vae=SimpleNamespace(name="tiny4", channels=4),
        resolution=64,
    )
    return len(read_examples(metadata)["train"])

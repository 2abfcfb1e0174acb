from __future__ import annotations

import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core import drops
from pipeline.core.commits import read_commit, read_commits
from pipeline.core.errors import SettingError, StorageError
from pipeline.core.samples import RawImage, Reject
from pipeline.core.store import Store, fingerprint
from pipeline.core.tables import from_parquet
from pipeline.engine.plan import Choice
from pipeline.sources.folder import Folder
from pipeline.stages.download import Download
from tests.pipeline.helpers.roots import run_here


def jpeg(seed: int, width: int = 320, height: int = 256) -> bytes:
    """Another picture for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def cats(tmp_path):
    """Three captioned pictures, in a folder and one below it."""
    home = tmp_path / "cats"
    (home / "more").mkdir(parents=True)
    for seed, name in enumerate(("b", "a", "more/c")):
        (home / f"{name}.jpg").write_bytes(jpeg(seed))
        (home / f"{name}.txt").write_text(f"cat {name}\n")
    return home


def fetch(source: Folder) -> dict[str, str]:
    """url or key -> caption or reason, of every shard."""
    found = {}
    for shard in source.shards():
        for item in source.fetch(shard):
            if isinstance(item, Reject):
                found[item.key] = item.reason
            else:
                found[item.ref.url] = item.ref.caption
    return found


def table(home, name: str, rows: list[dict]) -> None:
    path = home / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        comma = "\t" if name.endswith(".tsv") else ","
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        cells = (comma.join(f'"{c}"' if "\n" in str(c) else str(c) for c in line) for line in lines)
        path.write_text("\n".join(cells) + "\n")


# Sidecars.


def test_pictures_come_by_name_with_the_text_beside_them(cats):
    source = Folder(folder=str(cats))
    assert list(fetch(source).items()) == [
        ("a.jpg", "cat a\n"),
        ("b.jpg", "cat b\n"),
        ("more/c.jpg", "cat more/c\n"),
    ]
    (shard,) = source.shards()
    assert source.samples(shard) == 3
    keys = [item.ref.key for item in source.fetch(shard) if isinstance(item, RawImage)]
    assert keys == ["000000000", "000000001", "000000002"]


def test_the_bytes_come_as_they_are(cats):
    source = Folder(folder=str(cats))
    data = [item.data for item in source.fetch(source.shards()[0]) if isinstance(item, RawImage)]
    assert data == [(cats / n).read_bytes() for n in ("a.jpg", "b.jpg", "more/c.jpg")]


def test_a_url_is_read_as_a_path_is(cats):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({f"/cats/{p.relative_to(cats)}": p.read_bytes() for p in cats.rglob("*.*")})
    memory.pipe("/cats/alone.jpg", jpeg(9))
    try:
        found = fetch(Folder(folder="memory://cats"))
    finally:
        memory.rm("/cats", recursive=True)
    assert found == {
        "a.jpg": "cat a\n",
        "000000001": "no-caption",
        "b.jpg": "cat b\n",
        "more/c.jpg": "cat more/c\n",
    }


def test_another_extension(cats):
    (cats / "a.caption").write_text("other")
    found = fetch(Folder(folder=str(cats), caption_extension=".caption"))
    assert found["a.jpg"] == "other"
    assert found["000000001"] == found["000000002"] == "no-caption"


@pytest.mark.parametrize("text", ["", " \n\t ", "\x00\x07", "\u200b\ufeff "])
def test_an_empty_text_is_no_caption(cats, text):
    (cats / "a.txt").write_text(text)
    assert fetch(Folder(folder=str(cats)))["000000000"] == "no-caption"


def test_without_a_text_only_a_captioner_helps(cats):
    (cats / "a.txt").unlink()
    assert fetch(Folder(folder=str(cats)))["000000000"] == "no-caption"
    assert fetch(Folder(folder=str(cats), captions="none")) == {
        "a.jpg": "",
        "b.jpg": "",
        "more/c.jpg": "",
    }


def test_what_is_hidden_or_no_picture_is_no_sample(cats):
    (cats / ".hidden.jpg").write_bytes(jpeg(5))
    (cats / ".thumbnails").mkdir()
    (cats / ".thumbnails" / "t.jpg").write_bytes(jpeg(6))
    (cats / "README.md").write_text("mine")
    assert len(fetch(Folder(folder=str(cats)))) == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_of_other_editors(cats, encoding):
    (cats / "a.txt").write_bytes("Käse, 猫".encode(encoding))
    assert fetch(Folder(folder=str(cats)))["a.jpg"] == "Käse, 猫"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    "text", ["Cafe", "Käse\n", "a 猫 cat", "猫が 二匹\n", "ein Käse, 猫 👨‍👩‍👧"]
)
def test_utf16_without_its_mark(cats, encoding, text):
    (cats / "a.txt").write_bytes(text.encode(encoding))
    assert fetch(Folder(folder=str(cats)))["a.jpg"] == text


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        ("Café".encode("latin-1"), "latin-1"),
        ("猫の写真".encode("shift_jis"), "shift_jis"),
        ("кот".encode("koi8-r"), "koi8-r"),
        ("niño".encode("mac-roman"), "mac-roman"),
        ("猫".encode()[:-1], "big5"),
        (b"\xff\xfea\0b", "auto"),
    ],
)
def test_a_caption_in_another_encoding_is_a_reject_and_never_has_holes(cats, data, encoding):
    (cats / "a.txt").write_bytes(data)
    source = Folder(folder=str(cats))
    (shard,) = source.shards()
    (reject,) = (item for item in source.fetch(shard) if isinstance(item, Reject))
    assert reject.reason == "caption-encoding"
    assert reject.detail.startswith("a.txt: no utf-")
    assert reject.ref is not None
    assert reject.ref.url == "a.jpg"
    if encoding not in ("auto", "big5"):
        named = Folder(folder=str(cats), encoding=encoding)
        assert fetch(named)["a.jpg"] == data.decode(encoding)
        assert named.decisive() != source.decisive()


def test_the_text_beside_a_picture_in_any_case(cats):
    for stem, name in (("IMG_1", "IMG_1.TXT"), ("Img_2", "iMG_2.txt"), ("x", "x.Txt"), ("X", "")):
        (cats / f"{stem}.JPG").write_bytes(jpeg(ord(stem[0]) + len(name)))
        if name:
            (cats / name).write_text(f"text {name}")
    entries = {entry[0]: entry for spec in specs(cats) for entry in spec[3]}
    found = fetch(Folder(folder=str(cats)))
    assert found["IMG_1.JPG"] == "text IMG_1.TXT"
    assert found["Img_2.JPG"] == "text iMG_2.txt"
    assert found["x.JPG"] == "text x.Txt"
    assert "X.JPG" not in found  # x.Txt is another picture's
    assert entries["IMG_1.JPG"][2:] == ("IMG_1.TXT",)
    assert len(entries["a.jpg"]) == 2  # or its shard would be stale


RAW = ("more/d.CR2", "b.mov", "zz.dng")


def test_what_is_no_picture_by_its_name_is_a_reject_that_fails_no_shard(cats, tmp_path):
    before = specs(cats)
    for name in RAW:
        (cats / name).write_bytes(b"II*\0" + bytes(100))
    after = specs(cats)
    # Behind the pictures of the shard where their names would be: no picture's key moves.
    assert [[entry[0] for entry in spec[3]] for spec in after] == [
        ["a.jpg", "b.jpg", "b.mov"],
        ["more/c.jpg", "more/d.CR2", "zz.dng"],
    ]
    assert after[0][3][:2] == before[0][3]
    source = Folder(folder=str(cats), samples_per_shard=2)
    store = Store(tmp_path / "root")
    run_here(Download("folder", source, max_reject_rate=0.0), store)
    commit = read_commit(store, "folder/images", "00001")
    assert commit is not None
    assert (commit.samples, commit.rejects) == (1, {"undecodable": 2})
    (name,) = (name for name in commit.files if name.startswith("rejects/"))
    rows = from_parquet(store.read(f"folder/images/{name}")).to_pylist()
    assert [row["place"] for row in rows] == ["more/d.CR2", "zz.dng"]
    assert rows[0]["detail"].endswith("camera raw: develop it to a JPEG or TIFF first")
    # A takedown of all but the rejects is no outage either.
    drops.add(store, "folder", {commit.shard: ["000010000"]})
    assert run_here(Download("folder", source, max_reject_rate=0.0), store, Choice(stale=True)) == 1
    assert read_commits(store, "folder/images")["00001"].samples == 0
    table(
        cats, "t.csv", [{"file_name": "zz.dng", "text": "t"}, {"file_name": "a.jpg", "text": "t"}]
    )
    assert fetch(Folder(folder=str(cats), table="t.csv")) == {
        "000000000": "undecodable",
        "a.jpg": "t",
    }


# Order.


def specs(home, **settings) -> list[tuple]:
    return [s.spec for s in Folder(folder=str(home), samples_per_shard=2, **settings).shards()]


def test_a_picture_that_sorts_last_changes_only_the_last_shard(cats):
    before = specs(cats)
    (cats / "z.jpg").write_bytes(jpeg(7))
    (cats / "z.txt").write_text("z")
    after = specs(cats)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_an_appended_row_changes_only_the_last_shard(cats):
    rows = [{"file_name": f"{n}.jpg", "text": n} for n in ("more/c", "b", "a")]
    table(cats, "t.csv", rows)
    before = specs(cats, table="t.csv")
    table(cats, "t.csv", [*rows, {"file_name": "b.jpg", "text": "again"}])
    after = specs(cats, table="t.csv")
    assert after[0] == before[0]
    assert after[1] != before[1]


@pytest.mark.parametrize("name", ["a.txt", "b.jpg"])
def test_what_is_edited_makes_its_shard_stale(cats, name):
    before = specs(cats)
    (cats / name).write_bytes((cats / name).read_bytes() + b" ")
    after = specs(cats)
    assert after[0] != before[0]
    assert after[1:] == before[1:]


def test_what_is_replaced_by_as_many_bytes_makes_its_shard_stale(cats):
    before = specs(cats)
    (cats / "a.txt").write_text("dog a\n")
    os.utime(cats / "a.txt", (1e9, 1e9))
    assert specs(cats)[0] != before[0]


def test_where_the_folder_lies_decides_nothing(cats, tmp_path):
    before, decisive = specs(cats), Folder(folder=str(cats)).decisive()
    cats.rename(tmp_path / "moved")
    assert specs(tmp_path / "moved") == before
    assert Folder(folder=str(tmp_path / "moved")).decisive() == decisive


# Tables.

ROWS = [
    {"id": 7, "file_name": "b.jpg", "text": "007"},
    {"id": 8, "file_name": "more/../a.jpg", "text": "two\nlines"},
    {"id": 9, "file_name": "./more/c.jpg", "text": "null"},
]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_a_table_names_pictures_and_captions_in_its_order(cats, name):
    table(cats, name, ROWS)
    found = fetch(Folder(folder=str(cats), table=name))
    assert list(found.items()) == [
        ("b.jpg", "007"),
        ("more/../a.jpg", "two\nlines"),
        ("./more/c.jpg", "null"),
    ]


def test_columns_of_other_names(cats):
    table(cats, "t.csv", [{"path": "a.jpg", "caption": "A"}])
    found = fetch(Folder(folder=str(cats), table="t.csv", image_col="path", caption_col="caption"))
    assert found == {"a.jpg": "A"}


def test_a_table_without_captions_for_a_captioner(cats):
    table(cats, "t.csv", [{"file_name": "a.jpg"}])
    assert fetch(Folder(folder=str(cats), table="t.csv", captions="none")) == {"a.jpg": ""}


def test_rows_without_caption_or_file(cats):
    rows = [{"file_name": "a.jpg"}, {"text": "no file"}, {"file_name": "gone.jpg", "text": "g"}]
    table(cats, "t.jsonl", rows)
    found = fetch(Folder(folder=str(cats), table="t.jsonl"))
    assert found == {
        "000000000": "no-caption",
        "000000001": "failed_to_download",
        "000000002": "failed_to_download",
    }


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.jpg", "more/../../secret.jpg", "..", "/etc/passwd", "file:///etc/passwd"),
        *("http://127.0.0.1/a.jpg", "..\\secret.jpg", "a.jpg\0"),
    ],
)
def test_no_name_leads_out_of_the_folder(cats, name):
    (cats.parent / "secret.jpg").write_bytes(jpeg(8))
    table(cats, "t.jsonl", [{"file_name": name, "text": "t"}, {"file_name": "a.jpg", "text": "a"}])
    assert fetch(Folder(folder=str(cats), table="t.jsonl")) == {
        "000000000": "refused",
        "a.jpg": "a",
    }


def test_a_table_that_changes_under_way_is_not_mixed(cats):
    table(cats, "t.csv", ROWS)
    source = Folder(folder=str(cats), table="t.csv")
    (shard,) = source.shards()
    table(cats, "t.csv", ROWS[::-1])
    with pytest.raises(RuntimeError, match="run it again"):
        list(source.fetch(shard))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_a_stray_quote_in_a_table_gives_no_picture_anothers_caption(cats, name):
    comma = "," if name == "t.csv" else "\t"
    lines = ["file_name{0}text", 'a.jpg{0}"opens', "b.jpg{0}plain", 'more/c.jpg{0}closes"']
    (cats / name).write_text("\n".join(lines).format(comma) + f"\na.jpg{comma}1{comma}2\n")
    found = fetch(Folder(folder=str(cats), table=name))
    closes = {"b.jpg": "plain", "more/c.jpg": 'closes"', "000000003": "malformed-row"}
    opens = {"000000000": "malformed-row"} if comma == "," else {"a.jpg": '"opens'}
    assert found == {**opens, **closes}


# Sizes of shards and held-out pictures.


def many(home, count: int) -> None:
    for number in range(count):
        (home / f"{number:04d}.jpg").touch()
        (home / f"{number:04d}.txt").write_text("t")


def test_shards_of_an_older_version_are_not_stale(cats):
    """What enters a fingerprint is what it was, where nothing new is used."""
    table(cats, "t.csv", ROWS[:1])
    (spec,) = specs(cats, table="t.csv")
    size = os.path.getsize(cats / "b.jpg")
    version = f"{size}-{int(os.path.getmtime(cats / 'b.jpg'))}"
    assert spec[:2] == (fingerprint([[size, version]]), fingerprint([["b.jpg", "007"]]))
    assert spec[2:] == (0, (("b.jpg", size),))
    usual = {"captions": "own", "max_file_bytes": 100_000_000}
    assert Folder(folder=str(cats)).decisive() == usual


def test_a_small_folder_makes_many_shards_and_keeps_their_size(tmp_path):
    home, root = tmp_path / "many", Store(tmp_path / "root")
    home.mkdir()

    def sizes(store: Store = root) -> list[int]:
        source = Folder(folder=str(home))
        source.attach(store, "cats/lists")
        return [source.samples(shard) for shard in source.shards()]

    many(home, 40)
    assert sizes() == [16, 16, 8]
    many(home, 400)
    assert sizes() == [16] * 25  # the first sixteen are what they were
    assert sizes(Store(tmp_path / "other")) == [25] * 16
    old = Store(tmp_path / "old")  # of a version that knew one size
    old.write("cats/images/commits/00000.json", b"{}")
    assert sizes(old) == [400]
    assert not old.exists("cats/lists/samples_per_shard.json")
    root.write("cats/lists/samples_per_shard.json", b"[")
    with pytest.raises(SettingError, match="is no size of a shard; set samples_per_shard"):
        sizes()


def test_a_share_of_the_pictures_is_held_out_by_their_names(tmp_path):
    many(tmp_path, 300)

    def sides(**more) -> dict[str, str]:
        made = Folder(folder=str(tmp_path), holdout=0.1, captions="none", **more)
        return {entry[0]: shard.split for shard in made.shards() for entry in shard.spec[3]}

    before = sides()
    assert len(before) == 300
    assert 15 <= sum(side == "heldout" for side in before.values()) <= 45
    (tmp_path / "0000a.jpg").touch()
    assert {name: side for name, side in sides().items() if name in before} == before
    assert sides(samples_per_shard=7).items() >= before.items()
    ids = [s.id for s in Folder(folder=str(tmp_path), holdout=0.1).shards() if s.split != "train"]
    assert ids[0] == "90000"  # whatever comes to the others
    rows = [{"file_name": name} for name in before]
    table(tmp_path, "t.csv", rows)
    assert sides(table="t.csv") == before
    source = Folder(folder=str(tmp_path), holdout=0.1, captions="none", table="t.csv")
    for shard in source.shards():
        items = list(source.fetch(shard))
        assert {before[i.ref.url] for i in items if i.ref is not None} == {shard.split}
    with pytest.raises(ValueError, match="takes its share of split=train alone"):
        Folder(folder=str(tmp_path), holdout=0.1, split="val")


def test_shards_that_would_train_on_what_is_held_out_now_are_named(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.jpg").touch()
    store = Store(tmp_path / "root")

    def planned(holdout: float) -> list[str]:
        source = Folder(
            folder=str(tmp_path), captions="none", samples_per_shard=20, holdout=holdout
        )
        source.attach(store, "cats/lists")
        return [shard.id for shard in source.shards()]

    for shard in planned(0.0):
        store.write(f"cats/images/commits/{shard}.json", b"{}")
    assert planned(0.01) == ["00000", "00001", "00002"]
    with pytest.raises(SettingError, match="its shards 00001, 00002 would still train"):
        planned(0.7)
    store.write("cats/images/commits/90000.json", b"{}")  # it was held out from the beginning
    assert "00001" not in planned(0.7)


# Links and other things that are no files.


def test_links_stay_in_the_folder(cats):
    secret = cats.parent / "secret.jpg"
    secret.write_bytes(jpeg(8))
    (cats / "out.jpg").symlink_to(secret)
    (cats / "in.jpg").symlink_to("a.jpg")
    (cats / "nowhere.jpg").symlink_to("gone.jpg")
    os.mkfifo(cats / "pipe.jpg")
    (cats / "zero.jpg").symlink_to("/dev/zero")
    for stem in ("out", "in", "nowhere", "pipe", "zero"):
        (cats / f"{stem}.txt").write_text(stem)
    assert fetch(Folder(folder=str(cats))) == {
        "a.jpg": "cat a\n",
        "b.jpg": "cat b\n",
        "in.jpg": "in",
        "more/c.jpg": "cat more/c\n",
        "000000004": "failed_to_download",  # nowhere
        "000000005": "refused",
        "000000006": "refused",
        "000000007": "refused",
    }


def test_a_fifo_for_a_caption_does_not_hang(cats):
    (cats / "a.txt").unlink()
    os.mkfifo(cats / "a.txt")
    assert fetch(Folder(folder=str(cats)))["000000000"] == "no-caption"


def test_a_name_that_is_no_utf8_is_refused(cats):
    with open(os.fsencode(cats) + b"/caf\xe9.jpg", "wb") as file:
        file.write(jpeg(8))
    with open(os.fsencode(cats) + b"/caf\xe9.txt", "w") as text:
        text.write("t")
    source = Folder(folder=str(cats))
    (shard,) = source.shards()
    (reject,) = [item for item in source.fetch(shard) if isinstance(item, Reject)]
    assert "caf" in reject.detail


def test_a_file_over_the_limit_is_not_read(cats):
    with open(cats / "huge.jpg", "wb") as file:
        file.truncate(1 << 40)  # it has no blocks on the disk
    (cats / "huge.txt").write_text("huge")
    assert fetch(Folder(folder=str(cats)))["000000002"] == "too-large"


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folder": "nowhere"}, "folder=.*no such folder"),
        ({"table": "gone.csv"}, "table=gone.csv: no such file"),
        ({"table": "a.txt"}, "table=a.txt: known are .csv"),
        ({"table": "t.csv", "image_col": "file_nam"}, 'mean "file_name"'),
        ({"table": "t.csv", "caption_col": "txt"}, 'mean "text"'),
        ({"table": "broken.jsonl"}, "cannot be read"),
        ({"table": "broken.parquet"}, "cannot be read"),
        ({"table": "broken.csv"}, "cannot be read"),
        ({"table": "empty.csv"}, "no rows|cannot be read"),
        ({"table": "twice.csv"}, "cannot be read: two columns of the name 'text'"),
        ({"table": "lists.jsonl"}, r"line 1: text holds a list, needs text; --kind hf"),
        ({"caption_extension": ".cap"}, "captions=own.*set table: broken.csv"),
    ],
)
def test_settings_that_cannot_be_used(cats, settings, message):
    table(cats, "t.csv", ROWS)
    (cats / "broken.jsonl").write_text("{")
    (cats / "broken.csv").write_bytes(b"file_name,text\n\xff,\xfe\n")
    (cats / "broken.parquet").write_bytes(b"PAR1")
    (cats / "empty.csv").write_text("file_name,text\n")
    (cats / "twice.csv").write_text("file_name,text,text\na.jpg,one,two\n")
    table(cats, "lists.jsonl", [{"file_name": "a.jpg", "text": [t]} for t in ("one", "two")])
    with pytest.raises(SettingError, match=message) as error:
        Folder(**{"folder": str(cats), **settings}).shards()
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_listed(cats):
    here = os.open(cats, os.O_RDONLY)
    for _ in range(20):  # deeper than the system takes a path: as good as one without leave
        os.mkdir("d" * 250, dir_fd=here)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    with pytest.raises(StorageError, match="ddd: File name too long"):
        Folder(folder=str(cats)).shards()


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(SettingError, match="no pictures"):
        Folder(folder=str(tmp_path)).shards()


# Through the stage.


def test_a_fine_tuning_set_is_downloaded_and_grows(cats, tmp_path):
    store = Store(tmp_path / "root")
    stage = Download("folder", Folder(folder=str(cats), samples_per_shard=2))
    assert run_here(stage, store) == 2
    assert run_here(stage, store) == 0
    (cats / "z.jpg").write_bytes(jpeg(7))
    (cats / "z.txt").write_text("z")
    assert run_here(stage, store) == 0  # the last shard is stale, and says so
    assert run_here(stage, store, Choice(stale=True)) == 1
    row = pq.read_table(io.BytesIO(store.read("folder/images/00000.parquet"))).to_pylist()[0]
    assert row["url"] == "a.jpg"
    assert row["caption"] == "cat a"
    assert (row["width"], row["height"]) == (320, 256)


def test_only_the_wanted_keys_are_read(cats):
    source = Folder(folder=str(cats))
    (shard,) = source.shards()
    (item,) = source.fetch(shard, frozenset({"000000001"}))
    assert isinstance(item, RawImage)
    assert item.ref.key == "000000001"
    assert item.ref.url == "b.jpg"

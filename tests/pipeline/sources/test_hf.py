from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.core.errors import SettingError
from pipeline.core.samples import RawImage, Reject
from pipeline.core.store import Store
from pipeline.engine.plan import Choice
from pipeline.sources.files import resumable
from pipeline.sources.hf import HubDataset
from pipeline.sources.tables import parquet_rows
from pipeline.sources.textcaps import TextCaps
from pipeline.stages.download import Download
from tests.pipeline.helpers.hub_server import HubServer
from tests.pipeline.helpers.roots import run_here, tree


def jpeg(seed: int, width: int = 320, height: int = 256) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def parquet(rows: list[dict], group: int = 3) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=group)
    return buffer.getvalue()


def rows(start: int, count: int) -> list[dict]:
    """As the hub writes them: pictures are structs of bytes and path."""
    return [
        {"image": {"bytes": jpeg(n), "path": f"{n}.jpg"}, "text": f"picture {n}", "id": n}
        for n in range(start, start + count)
    ]


FIRST, SECOND = rows(0, 8), rows(8, 2)
VALIDATION = rows(100, 2)
FILES = {
    "README.md": b"about",
    "data/train-00000-of-00002.parquet": parquet(FIRST),
    "data/train-00001-of-00002.parquet": parquet(SECOND),
    "data/validation-00000-of-00001.parquet": parquet(VALIDATION),
}


@pytest.fixture
def local(tmp_path) -> str:
    home = tmp_path / "with space é"
    for name, data in FILES.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data)
    return str(home)


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as found:
        found.repos["cats/many"] = dict(FILES)
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("MICRODIT_SCRATCH", str(tmp_path / "scratch"))
        monkeypatch.setattr(resumable, "BACKOFF_S", 0.01)
        yield found


def fetch(source: HubDataset) -> list[RawImage | Reject]:
    return [item for shard in source.shards() for item in source.fetch(shard)]


def captions(source: HubDataset) -> list[str]:
    return [i.ref.caption if isinstance(i, RawImage) else i.reason for i in fetch(source)]


# Rows and shards.


def test_a_folder_of_parquet_files(local):
    source = HubDataset(repo=local)
    found = fetch(source)
    assert captions(source) == [row["text"] for row in FIRST + SECOND]
    assert [i.data for i in found if isinstance(i, RawImage)] == [
        row["image"]["bytes"] for row in FIRST + SECOND
    ]
    shards = source.shards()
    assert [(s.id, s.split, source.samples(s)) for s in shards] == [
        ("00000", "train", 8),
        ("00001", "train", 2),
    ]
    assert isinstance(found[8], RawImage)
    assert found[8].ref.key == "000010000"
    assert found[8].ref.url == "data/train-00001-of-00002.parquet#0"


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6, 7, 100])
def test_a_file_is_cut_at_its_row_groups(local, most):
    """Groups of 3, 3 and 2 rows."""
    source = HubDataset(repo=local, samples_per_shard=most)
    assert captions(source) == [row["text"] for row in FIRST + SECOND]
    assert max(source.samples(s) for s in source.shards()) <= most


@given(st.lists(st.integers(0, 30)), st.integers(1, 20))
def test_ranges_hold_every_row_once(groups, most):
    found = parquet_rows.ranges(groups, most)
    assert [n for first, rows in found for n in range(first, first + rows)] == [*range(sum(groups))]
    assert all(0 < rows <= most for _, rows in found)


def test_splits_have_our_names(local):
    source = HubDataset(repo=local, splits="train,validation=val")
    assert [s.split for s in source.shards()] == ["train", "train", "val"]
    assert captions(source)[-1] == "picture 101"


def test_only_files_that_match(local):
    assert captions(HubDataset(repo=local, files="*00001-of*")) == ["picture 8", "picture 9"]


def test_only_the_wanted_keys(local):
    source = HubDataset(repo=local)
    (item,) = source.fetch(source.shards()[0], frozenset({"000000005"}))
    assert isinstance(item, RawImage)
    assert item.ref.caption == "picture 5"


def test_a_binary_column(tmp_path):
    (tmp_path / "train.parquet").write_bytes(parquet([{"jpg": jpeg(1), "alt": "one"}]))
    source = HubDataset(repo=str(tmp_path), image_col="jpg", caption_col="alt")
    assert captions(source) == ["one"]


def test_no_number_is_no_caption_and_no_rows_are_no_dataset(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_bytes(parquet([{"image": jpeg(1), "text": x} for x in (1.5, float("nan"))]))
    assert captions(HubDataset(repo=str(tmp_path))) == ["1.5", "no-caption"]
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(SettingError, match="have no rows"):
        HubDataset(repo=str(tmp_path)).shards()


def test_rows_that_lack_something(tmp_path):
    good = jpeg(1)
    cells = [
        ({"bytes": good, "path": None}, "good"),
        ({"bytes": None, "path": "/etc/passwd"}, "a path of somebody's disk"),
        (None, "no picture"),
        ({"bytes": good, "path": None}, None),
        ({"bytes": good, "path": None}, " \0\n"),
        ({"bytes": bytes(3_000_000), "path": None}, "large"),
    ]
    table = [{"image": image, "text": text} for image, text in cells]
    (tmp_path / "train.parquet").write_bytes(parquet(table))
    found = captions(HubDataset(repo=str(tmp_path), max_file_bytes=2_000_000))
    assert found == ["good", "undecodable", "undecodable", *["no-caption"] * 2, "too-large"]


def test_memory_is_that_of_a_row_group(tmp_path):
    """1,000 pictures of 50 KB, 50 MB, in row groups of 100, as the hub writes them."""
    noise = np.random.default_rng(0)
    table = [{"image": {"bytes": noise.bytes(50_000)}, "text": "t"} for _ in range(1_000)]
    (tmp_path / "train.parquet").write_bytes(parquet(table, group=100))
    source = HubDataset(repo=str(tmp_path))
    (shard,) = source.shards()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    peak = max(pa.total_allocated_bytes() - before for _ in source.fetch(shard))
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15_000_000
    assert python < 5_000_000


# Captions.

SEVERAL = [
    {"image": {"bytes": jpeg(n)}, "reference_strs": [f"{n}.{m}" for m in range(5)]}
    for n in range(40)
]


@pytest.fixture
def textcaps(tmp_path) -> str:
    home = tmp_path / "TextCaps"
    (home / "default" / "train").mkdir(parents=True)
    (home / "default" / "validation").mkdir()
    odd = [{"image": {"bytes": jpeg(90)}, "reference_strs": ["", None, " ", "only", ""]}]
    none = [{"image": {"bytes": jpeg(91)}, "reference_strs": []}]
    (home / "default/train/0000.parquet").write_bytes(parquet(SEVERAL))
    (home / "default/validation/0000.parquet").write_bytes(parquet(odd + none))
    return str(home)


def test_textcaps_takes_one_of_five_captions_by_seed_and_key(textcaps):
    first, again = captions(TextCaps(repo=textcaps)), captions(TextCaps(repo=textcaps))
    other = captions(TextCaps(repo=textcaps, seed=1))
    assert first == again != other
    assert [c.split(".")[0] for c in first[:40]] == [str(n) for n in range(40)]
    assert {c.split(".")[1] for c in first[:40]} == set("01234")
    assert first[40:] == ["only", "no-caption"]
    assert all(
        not i.ref.references for i in fetch(TextCaps(repo=textcaps)) if isinstance(i, RawImage)
    )


def test_the_choice_does_not_depend_on_the_other_rows(textcaps):
    source = TextCaps(repo=textcaps)
    shard = source.shards()[0]
    alone = list(source.fetch(shard, frozenset({"000000030"})))
    assert alone == [fetch(source)[30]]


def test_the_first_or_all(textcaps):
    assert captions(TextCaps(repo=textcaps, captions="first"))[:2] == ["0.0", "1.0"]
    every = fetch(TextCaps(repo=textcaps, captions="all"))
    assert isinstance(every[0], RawImage)
    assert every[0].ref.references == ("0.0", "0.1", "0.2", "0.3", "0.4")
    assert every[0].ref.caption in every[0].ref.references
    assert isinstance(every[40], RawImage)
    assert every[40].ref.references == ("only",)


def test_no_captions_for_a_captioner(textcaps):
    assert set(captions(TextCaps(repo=textcaps, caption_col=""))) == {""}


def test_textcaps_keeps_every_size(textcaps, tmp_path):
    small = [{"image": {"bytes": jpeg(1, 90, 40)}, "reference_strs": ["s"]}]
    large = [{"image": {"bytes": jpeg(2, 1200, 900)}, "reference_strs": ["l"]}]
    (tmp_path / "TextCaps/default/train/0000.parquet").write_bytes(parquet(small + large))
    store = Store(tmp_path / "root")
    run_here(Download("textcaps", TextCaps(repo=textcaps, captions="all")), store)
    table = pq.read_table(io.BytesIO(store.read("textcaps/images/00000.parquet"))).to_pylist()
    assert [(r["width"], r["height"], r["references"]) for r in table] == [
        (90, 40, ["s"]),
        (1200, 900, ["l"]),
    ]


# The hub.


@pytest.mark.parametrize("repo", ["cats/many", "cats/many@main", "hf://datasets/cats/many"])
def test_the_hub_gives_what_a_folder_of_its_files_gives(server, local, repo):
    assert captions(HubDataset(repo=repo)) == captions(HubDataset(repo=local))


def test_a_url_is_read_as_a_folder_is(local, monkeypatch, tmp_path):
    import fsspec

    monkeypatch.setenv("MICRODIT_SCRATCH", str(tmp_path / "scratch"))
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/many/{name}": data for name, data in FILES.items()})
    try:
        assert captions(HubDataset(repo="memory://many")) == captions(HubDataset(repo=local))
    finally:
        memory.rm("/many", recursive=True)


def test_files_go_when_their_shard_is_made(server, tmp_path):
    source = HubDataset(repo="cats/many", samples_per_shard=8)
    list(source.fetch(source.shards()[0]))
    assert not [p for p in (tmp_path / "scratch").iterdir() if "footer" not in p.name]


def test_planning_again_asks_for_no_file(server):
    before = HubDataset(repo="cats/many").shards()
    server.seen.clear()
    assert HubDataset(repo="cats/many").shards() == before
    assert not server.requests("/resolve/") + server.requests("/resolve/", "HEAD")


def test_planning_transfers_no_pictures(server):
    big = [
        {"image": {"bytes": np.random.default_rng(n).bytes(500_000)}, "text": "t"} for n in (1, 2)
    ]
    server.repos["cats/many"] = {"train.parquet": parquet(big)}
    HubDataset(repo="cats/many").shards()
    ranges = [r.headers.get("range") for r in server.requests("/resolve/")]
    assert ranges == [f"bytes={len(parquet(big)) - parquet_rows.TAIL}-"]


def test_a_footer_longer_than_its_first_part(server, monkeypatch, local):
    monkeypatch.setattr(parquet_rows, "TAIL", 40)
    assert captions(HubDataset(repo="cats/many")) == captions(HubDataset(repo=local))


def test_a_new_file_or_readme_changes_no_earlier_shard(server):
    before = HubDataset(repo="cats/many").shards()
    server.commit = "d" * 40
    server.repos["cats/many"]["README.md"] = b"more about"
    server.repos["cats/many"]["data/train-00002.parquet"] = parquet(rows(20, 1))
    after = HubDataset(repo="cats/many").shards()
    assert after[:2] == before
    assert len(after) == 3


def test_another_content_is_another_shard(server):
    before = HubDataset(repo="cats/many").shards()
    server.commit = "d" * 40
    server.repos["cats/many"]["data/train-00000-of-00002.parquet"] = parquet(rows(50, 8))
    after = HubDataset(repo="cats/many").shards()
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_a_file_that_differs_from_the_plan_is_not_used(server):
    source = HubDataset(repo="cats/many")
    shard = source.shards()[0]
    server.repos["cats/many"]["data/train-00000-of-00002.parquet"] = parquet(rows(50, 8))
    with pytest.raises(resumable.TransferError, match="sha256"):
        list(source.fetch(shard))


def test_a_local_file_that_differs_from_the_plan_is_not_used(local):
    source = HubDataset(repo=local)
    shard = source.shards()[0]
    with open(f"{local}/data/train-00000-of-00002.parquet", "wb") as file:
        file.write(parquet(rows(50, 8)))
    with pytest.raises(RuntimeError, match="run it again"):
        list(source.fetch(shard))


def test_a_broken_connection_is_tried_again(server, local):
    server.fault(path="train-00000", cut=1000, times=2)
    assert captions(HubDataset(repo="cats/many")) == captions(HubDataset(repo=local))


def test_a_busy_hub_is_asked_again(server, local):
    server.busy = 3
    assert captions(HubDataset(repo="cats/many")) == captions(HubDataset(repo=local))
    server.busy = 99
    with pytest.raises(SettingError, match=r"cats/many: the hub cannot be asked: .*503"):
        HubDataset(repo="cats/many").shards()


def test_a_gated_dataset_needs_a_token(server, monkeypatch, local):
    server.gated.add("cats/many")
    with pytest.raises(SettingError, match="gated"):
        HubDataset(repo="cats/many").shards()
    monkeypatch.setenv("HF_TOKEN", server.token)
    source = HubDataset(repo="cats/many")
    assert captions(source) == captions(HubDataset(repo=local))
    assert server.token not in repr(source.shards()) + repr(source.decisive())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo": "no such folder"}, "no such folder, and no OWNER/NAME"),
        ({"repo": "cats/none"}, "no such dataset"),
        ({"repo": "cats/many@v9"}, "no revision v9"),
        ({"repo": "cats/text"}, "cats/text@refs/convert/parquet"),
        ({"repo": "cats/broken"}, "broken/train.parquet: no parquet file|no parquet file"),
        ({"splits": "test"}, "has 'test' for a word"),
        ({"splits": ""}, "splits=: name at least one"),
        ({"splits": "train,train=val"}, "train-00000-of-00002.parquet would come twice"),
        ({"caption_col": "image"}, "caption_col=image: is of type struct.*name a column of text"),
        ({"image_col": "img"}, "image_col=img: no such column.*image, text, id"),
        ({"caption_col": "txet"}, 'mean "text"'),
    ],
)
def test_settings_that_cannot_be_used(server, settings, message):
    server.repos["cats/text"] = {"train.csv": b"x" * 100}
    server.repos["cats/broken"] = {"train.parquet": b"<html>" * 100}
    with pytest.raises(SettingError, match=message) as error:
        HubDataset(**{"repo": "cats/many", **settings}).shards()
    assert "\n" not in str(error.value)


def test_a_run_from_the_hub_is_repeatable(server, tmp_path):
    for name in ("one", "two"):
        source = HubDataset(repo="cats/many", samples_per_shard=4)
        assert run_here(Download("hf", source), Store(tmp_path / name), Choice()) == 4
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_text_that_is_no_utf8_costs_its_row_alone(tmp_path):
    bad = [b"zero", b"caf\xe9", b"two", b"three"]
    names = pa.array([b"a.jpg", b"caf\xe9.jpg", b"c.jpg", None]).view(pa.string())
    pictures = pa.array([jpeg(n) for n in range(4)], pa.binary())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 4, 4]), pa.array(bad).view(pa.string()))
    for number, texts in enumerate((pa.array(bad).view(pa.string()), lists)):
        struct = pa.StructArray.from_arrays([pictures, names], ["bytes", "path"])
        home = tmp_path / f"{number} [1] *?"
        home.mkdir()
        pq.write_table(pa.table({"image": struct, "text": texts}), home / "train-[0].parquet")
        made = HubDataset(repo=str(home), captions="first")
        (shard,) = made.shards()
        found = [i.reason if isinstance(i, Reject) else i.ref.caption for i in made.fetch(shard)]
        last = "three" if number == 0 else "no-caption"
        assert found == ["zero", "caption-encoding", "two", last]
    categories = pa.array(["a", "b", "a", "b"]).dictionary_encode()
    home = tmp_path / "categories"
    home.mkdir()
    pq.write_table(pa.table({"image": pictures, "text": categories}), home / "train.parquet")
    made = HubDataset(repo=str(home))
    found = [item.ref.caption for item in made.fetch(made.shards()[0]) if item.ref is not None]
    assert found == ["a", "b", "a", "b"]

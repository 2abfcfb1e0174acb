"""Sources that are archives, through the download stage: upstream's layouts over real HTTP."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import build_stage, load_config
from pipeline.core.catalog import Catalog
from pipeline.core.commits import Commit, read_commits, read_file
from pipeline.core.errors import SettingError
from pipeline.core.staged_file import SCRATCH_VARIABLE, scratch
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.engine.plan import Choice, plan
from pipeline.sources.coco2014 import Coco2014
from pipeline.sources.files import archives, resumable, transfer
from pipeline.sources.files.archives import BrokenArchive
from pipeline.sources.files.resumable import TransferError
from pipeline.sources.files.wds_samples import samples
from pipeline.sources.journeydb import strip_flags
from pipeline.sources.sa1b import SA1B
from pipeline.sources.webdataset import WebDataset
from pipeline.stages.download import Download
from pipeline.stages.images import read_images
from tests.pipeline.helpers import upstream
from tests.pipeline.helpers.hub_server import COMMIT, HubServer
from tests.pipeline.helpers.roots import run_here, tree

PIPELINE = str(Path(sys.executable).with_name("pipeline"))


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[HubServer]:
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path / "scratch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(resumable, "BACKOFF_S", 0.01)
    with HubServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "root")


def stage(source: str, **settings: Any) -> Download:
    overrides = {f"download.{name}": value for name, value in settings.items()}
    made = build_stage("download", load_config(source, Path(os.devnull), overrides))
    assert isinstance(made, Download)
    return made


def rows(store: Store, source: str, shard: str) -> list[dict[str, Any]]:
    commit = commits(store, source)[shard]
    data = read_file(store, f"{source}/images", commit, ".parquet")
    return from_parquet(data).to_pylist()


def commits(store: Store, source: str) -> dict[str, Commit]:
    return read_commits(store, f"{source}/images")


def stored(store: Store, source: str, shard: str) -> dict[str, bytes]:
    commit = commits(store, source)[shard]
    return {i.key: i.data for i in read_images(store, f"{source}/images", commit)}


def everything(root: Path) -> bytes:
    return b"".join(p.read_bytes() for p in root.rglob("*") if p.is_file())


# --- cc12m


def test_cc12m_comes_from_the_hub_with_its_alt_text_cleaned(server, store):
    server.repos["pixparse/cc12m-wds"] = upstream.cc12m()
    cc12m = stage("cc12m")
    assert run_here(cc12m, store, Choice("0-1")) == 2
    originals = upstream.samples(1)
    found = rows(store, "cc12m", "00001")
    assert [row["key"] for row in found] == ["000010000", "000010001", "000010002", "000010003"]
    assert [row["caption"] for row in found] == [f"picture {n} of tar 1" for n in range(4)]
    assert [row["url"] for row in found] == [f"http://web/{s.key}.jpg" for s in originals]
    assert list(stored(store, "cc12m", "00001").values()) == [s.data for s in originals]
    assert commits(store, "cc12m")["00001"].inputs["settings"]["hub"] == {
        "pixparse/cc12m-wds": COMMIT
    }
    assert list(scratch().iterdir()) == []


def test_a_plan_asks_the_hub_once_and_what_it_adds_later_makes_nothing_stale(server, store):
    server.repos["pixparse/cc12m-wds"] = upstream.cc12m()
    todo = plan(stage("cc12m"), Catalog(store))
    assert len(todo.pending) == 2176
    assert len(server.seen) == 1
    run_here(stage("cc12m"), store, Choice("0"))
    asked = len(server.requests("/api/"))
    server.commit = "d" * 40
    todo = plan(stage("cc12m"), Catalog(store))
    assert not todo.groups["cc12m/images"].stale
    assert len(server.requests("/api/")) == asked
    moved = stage("cc12m", base=f"hf://datasets/pixparse/cc12m-wds@{'d' * 40}")
    assert plan(moved, Catalog(store)).groups["cc12m/images"].stale


def test_a_commit_is_planned_with_no_network(store, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    pinned = stage("cc12m", base=f"hf://datasets/pixparse/cc12m-wds@{COMMIT}")
    assert len(plan(pinned, Catalog(store)).pending) == 2176
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(SettingError, match="pixparse/cc12m-wds: the hub cannot be asked"):
        plan(stage("cc12m"), Catalog(Store(store.root + "-other")))


def test_a_cut_transfer_gives_the_same_bytes(server, store, tmp_path):
    server.repos["pixparse/cc12m-wds"] = upstream.cc12m(1)
    run_here(stage("cc12m"), store, Choice("0"))
    server.fault(cut=5000, times=3)
    other = Store(tmp_path / "other")
    run_here(stage("cc12m"), other, Choice("0"))
    assert tree(Path(other.root)) == tree(Path(store.root))
    assert not any(fault.times for fault in server.faults)


@pytest.mark.parametrize("cut", ["the closing blocks", "in a header", "in a picture"])
def test_an_archive_that_upstream_has_cut_off_commits_nothing(server, store, cut):
    whole = upstream.wds_tar(upstream.samples(0))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        last, header, picture = tar.getmembers()[-1], *tar.getmembers()[3:4] * 2
    places = {
        "the closing blocks": last.offset_data + 512,  # every member is whole
        "in a header": header.offset + 100,
        "in a picture": picture.offset_data + 1000,
    }
    server.repos["pixparse/cc12m-wds"] = {"cc12m-train-0000.tar": whole[: places[cut]]}
    with pytest.raises(BrokenArchive, match=r"cc12m-train-0000.tar: .*(breaks off|unexpected end)"):
        run_here(stage("cc12m"), store, Choice("0"))
    assert commits(store, "cc12m") == {}
    assert list(scratch().iterdir()) == []
    with pytest.raises(TransferError, match=r"no file cc12m-train-0001.tar"):
        run_here(stage("cc12m"), store, Choice("1"))


# --- sa1b


@pytest.fixture
def sa1b(server, tmp_path) -> Path:
    """Meta's list of two tars, as a path."""
    server.files["sa_000020.tar"] = upstream.sa1b_tar([201, 202, 203])
    server.files["sa_000021.tar"] = upstream.sa1b_tar([211, 212])
    server.repos["PixArt-alpha/SAM-LLaVA-Captions10M"] = {
        "SA1B_caption.tar.gz": upstream.sa1b_captions([n for n in range(150, 260) if n != 202])
    }
    path = tmp_path / "links.tsv"
    path.write_text(upstream.sa1b_links(server.url, ["sa_000021.tar", "sa_000020.tar"]))
    return path


def test_sa1b_has_no_captions_of_its_own_and_its_photographs_are_shrunk(server, store, sa1b):
    assert run_here(stage("sa1b", links=str(sa1b)), store) == 2
    found = rows(store, "sa1b", "00020")
    assert [row["key"] for row in found] == ["0002000000", "0002000001", "0002000002"]
    assert [row["caption"] for row in found] == [""] * 3
    assert found[0]["url"] == "sa1b:sa_000020.tar/sa_201.jpg"
    sizes = {(r["width"], r["height"], r["original_width"], r["original_height"]) for r in found}
    assert sizes == {(768, 512, 900, 600)}


def test_sa1b_with_the_published_captions(server, store, sa1b, monkeypatch):
    monkeypatch.setattr("pipeline.sources.sa1b.SPAN", 7)  # many buckets
    run_here(stage("sa1b", links=str(sa1b), captions="pixart"), store)
    found = {row["key"]: (row["status"], row["caption"]) for row in rows(store, "sa1b", "00020")}
    assert found == {
        "0002000000": ("success", "The image shows 201."),
        "0002000001": ("no-caption", None),
        "0002000002": ("success", "The image shows 203."),
    }
    assert len(server.requests("SA1B_caption")) == 2  # once, by way of the hub, for both shards
    settings = commits(store, "sa1b")["00020"].inputs["settings"]
    assert settings == {"captions": "pixart", "hub": {"PixArt-alpha/SAM-LLaVA-Captions10M": COMMIT}}


def test_links_of_sa1b_are_nowhere_but_in_the_list(server, store, sa1b, tmp_path, capfd, caplog):
    server.fault(path="sa_000020", cut=1000)
    server.fault(path="sa_000020", status=403)
    with pytest.raises(TransferError, match=r"sa_000020.tar: refused .* get a new one") as error:
        run_here(stage("sa1b", links=str(sa1b)), store)
    assert "s3cr3t" not in str(error.value)
    # A new list, in another order and with one more tar, goes on where the old one expired.
    server.files["sa_000005.tar"] = upstream.sa1b_tar([51])
    names = ["sa_000005.tar", "sa_000020.tar", "sa_000021.tar"]
    sa1b.write_text(upstream.sa1b_links(server.url, names).replace("67A68F58", "99999999"))
    run_here(stage("sa1b", links=str(sa1b)), store)
    assert server.requests("sa_000020.*99999999")[0].headers["range"] == "bytes=1000-"
    assert sorted(commits(store, "sa1b")) == ["00005", "00020", "00021"]
    assert b"s3cr3t" not in everything(Path(store.root)) + everything(scratch())
    assert "s3cr3t" not in "".join(capfd.readouterr()) + caplog.text
    assert "s3cr3t" not in repr(SA1B(links=f"{server.url}/list?s3cr3t"))


def test_a_list_that_windows_has_saved(tmp_path):
    path = tmp_path / "links.tsv"
    path.write_text("\ufefffile_name\tcdn_link\r\nsa_000001.tar\thttps://host/1\r\n")
    assert [shard.id for shard in SA1B(links=str(path)).shards()] == ["00001"]


def test_a_number_that_no_picture_has(server, store, sa1b, tmp_path):
    (tmp_path / "sa_000020.tar").write_bytes(upstream.sa1b_tar([201, 10**30]))
    run_here(stage("sa1b", archives=str(tmp_path), captions="pixart"), store)
    assert [r["status"] for r in rows(store, "sa1b", "00020")] == ["success", "no-caption"]


def test_sa1b_of_a_folder_of_tars(server, store, tmp_path):
    (tmp_path / "sa_000007.tar").write_bytes(upstream.sa1b_tar([71]))
    run_here(stage("sa1b", archives=str(tmp_path)), store)
    assert list(commits(store, "sa1b")) == ["00007"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a first line"),
        ("file_name,cdn_link\nsa_000001.tar,http://x\n", "needs a first line"),
        ("file_name\tcdn_link\nsa_000001.tar\tfile:///etc/passwd?s3cr3t\n", "line 2: sa_000001"),
        ("file_name\tcdn_link\n", "names no sa_NNNNNN.tar"),
    ],
)
def test_lists_of_sa1b_that_are_none(tmp_path, text, message):
    path = tmp_path / "links.tsv"
    path.write_text(text)
    with pytest.raises(SettingError, match=message) as error:
        SA1B(links=str(path)).shards()
    assert "s3cr3t" not in str(error.value)
    with pytest.raises(SettingError, match="set links"):
        SA1B().shards()


# --- journeydb


def test_journeydb_needs_leave_and_gives_prompts_without_options(server, store, monkeypatch):
    prompts = ["a red fox --ar 16:9 --v 5", "https://s.mj.run/x a castle", "--v 4", None]
    files = upstream.journeydb(
        {"train": {0: prompts, 7: ["a boat"]}, "valid": {0: ["a tree --q 2"]}}
    )
    server.repos["JourneyDB/JourneyDB"] = files
    server.gated.add("JourneyDB/JourneyDB")
    journeydb = stage("journeydb", splits="train,valid")
    with pytest.raises(SettingError, match="JourneyDB/JourneyDB is gated: accept its terms on"):
        run_here(journeydb, store, Choice("0"))
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert run_here(journeydb, store, Choice("0,7,200")) == 3
    found = [(row["status"], row["caption"]) for row in rows(store, "journeydb", "00000")]
    assert found == [
        ("success", "a red fox"),
        ("success", "a castle"),
        ("no-caption", None),
        ("no-caption", None),
    ]
    assert [row["caption"] for row in rows(store, "journeydb", "00007")] == ["a boat"]
    assert [row["caption"] for row in rows(store, "journeydb", "00200")] == ["a tree"]
    splits = {id: commit.split for id, commit in commits(store, "journeydb").items()}
    assert splits == {"00000": "train", "00007": "train", "00200": "val"}
    assert server.token.encode() not in everything(Path(store.root))


def test_an_annotation_of_no_archive_costs_nothing_else(store, tmp_path):
    files = upstream.journeydb({"train": {0: ["a fox"], 10**30: ["a stray"], 201: ["another"]}})
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    run_here(stage("journeydb", base=str(tmp_path)), store, Choice("0"))
    assert [row["caption"] for row in rows(store, "journeydb", "00000")] == ["a fox"]


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("a cat --ar 16:9 --v 5", "a cat"),
        ("a cat —ar 16:9 —q 2", "a cat"),
        ("a cat –s 750, –niji 5", "a cat"),
        ("a cat --ar16:9 --v 5.1, --style raw", "a cat"),
        ("<https://s.mj.run/a> https://x.y/b.png a cat --iw .5", "a cat"),
        ("cat::2 dog::-0.5 --no people, hats --ar 3:2", "cat dog"),
        ("a cat --no dogs", "a cat"),
        ("cat--ar 2:3", "cat"),
        ("a cat -- ar 16 : 9 --tile dancing", "a cat dancing"),
        ("a well-lit room — with a dog", "a well-lit room — with a dog"),
        ("a portrait — old man, 35mm", "a portrait — old man, 35mm"),
        ("a portrait -- old man --hd", "a portrait -- old man"),
        ("photograph—old man", "photograph—old man"),
        ("a cat—video game —hd —test", "a cat—video game"),
        ("a cat—v 4 —style raw —ar16:9", "a cat"),
        ("a cat —no people, hats", "a cat"),
        ("a man with 3 dogs --seed 123 --hd", "a man with 3 dogs"),
        ("octane render, --testp --creative --upbeta", "octane render"),
        ("--v 4", ""),
    ],
)
def test_options_of_prompts(prompt, caption):
    assert strip_flags(prompt) == caption


def test_a_prompt_made_to_be_slow_is_not():
    began = time.monotonic()
    for bad in ("--" * 200_000, "-- ar " * 50_000, "<https://" * 50_000, "::" * 100_000):
        strip_flags(bad)
    assert time.monotonic() - began < 5


# --- diffusiondb


def test_diffusiondb_filters_by_both_scores(server, store):
    parts = {
        1: [("a", 0.1, 0.2), ("b", 0.21, 0.0), ("c", 0.0, 0.9), (None, 0, 0), ("", 0.0, 0.0)],
        10_001: [("d", 0.0, 0.0), ("e", None, 0.0), ("f", float("nan"), 0.0)],
    }
    server.repos["poloclub/diffusiondb"] = upstream.diffusiondb(parts)  # type: ignore[arg-type]
    diffusiondb = stage("diffusiondb")
    shards = diffusiondb.settings.shards()
    assert (len(shards), shards[0].id, shards[-1].id) == (14_000, "00001", "14000")
    run_here(diffusiondb, store, Choice("1,10001"))
    assert [row["status"] for row in rows(store, "diffusiondb", "00001")] == [
        *("success", "filtered", "filtered", "no-caption", "no-caption")
    ]
    second = rows(store, "diffusiondb", "10001")
    assert [(row["status"], row["caption"]) for row in second] == [
        *(("success", "d"), ("filtered", None), ("filtered", None))
    ]
    names = list(stored(store, "diffusiondb", "10001"))
    assert names == ["100010000"]
    lenient = stage("diffusiondb", max_nsfw=0.5)
    assert run_here(lenient, store, Choice("1", stale=True)) == 1
    assert [row["status"] for row in rows(store, "diffusiondb", "00001")][:3] == [
        *("success", "success", "filtered")
    ]
    assert len(server.requests("metadata-large")) == 2  # once, by way of the hub


# --- coco2014


def test_coco_keeps_every_reference_in_order_of_id(server, store, monkeypatch):
    ids = [42, 581929, 73, 1000, 133]
    server.files.update(upstream.coco2014(ids))
    monkeypatch.setattr(Coco2014, "images", len(ids))
    coco = stage("coco2014", base=server.url, samples_per_shard=2)
    assert run_here(coco, store) == 3
    found = [row for shard in commits(store, "coco2014") for row in rows(store, "coco2014", shard)]
    order = sorted(ids)
    assert [row["caption"] for row in found] == [f"Caption 0 of {n}" for n in order]
    assert found[0]["references"] == [f"Caption {k} of 42" for k in range(5)]
    assert found[0]["url"] == f"{server.url}/val2014/COCO_val2014_000000000042.jpg"
    data = {
        k: d for s in commits(store, "coco2014") for k, d in stored(store, "coco2014", s).items()
    }
    assert list(data.values()) == [upstream.picture(n) for n in order]
    assert {commit.split for commit in commits(store, "coco2014").values()} == {"val"}
    whole = [r for r in server.requests("/zips/val2014.zip") if "range" not in r.headers]
    assert len(whole) == 1


def test_a_copy_that_is_mended_is_read_again(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Coco2014, "images", 2)
    coco = stage("coco2014", base=str(tmp_path / "coco"))
    for ids in ([1], [1, 2]):
        for name, data in upstream.coco2014(ids).items():
            (tmp_path / "coco" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "coco" / name).write_bytes(data)
        if len(ids) == 1:
            with pytest.raises(SettingError, match="1 pictures have captions"):
                run_here(coco, store)
    assert run_here(coco, store) == 1


def test_annotations_that_are_none(store, tmp_path):
    table = upstream.parquet([{"image_name": "a.webp", "part_id": 1, "prompt": "a"}])
    (tmp_path / "metadata-large.parquet").write_bytes(table)
    zipped = tmp_path / "diffusiondb-large-part-1/part-000001.zip"
    zipped.parent.mkdir()
    zipped.write_bytes(upstream.zipped([("a.webp", upstream.picture(1))]))
    with pytest.raises(SettingError, match="has no column image_nsfw"):
        run_here(stage("diffusiondb", base=str(tmp_path)), store, Choice("1"))
    captions = upstream.zipped([("annotations/captions_val2014.json", b'{"images": []}')])
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/annotations_trainval2014.zip").write_bytes(captions)
    with pytest.raises(BrokenArchive, match="no captions as COCO writes them: KeyError"):
        run_here(stage("coco2014", base=str(tmp_path)), store, Choice("0"))


def test_coco_is_checked_against_its_size_and_its_checksum(server, store, monkeypatch):
    server.files.update(upstream.coco2014([1, 2]))
    with pytest.raises(SettingError, match="2 pictures have captions, COCO 2014 has 40504"):
        run_here(stage("coco2014", base=server.url), store, Choice("0"))
    monkeypatch.setattr("pipeline.sources.coco2014.OFFICIAL", server.url)
    shutil.rmtree(scratch())
    with pytest.raises(TransferError, match="upstream says 0a379cfc70b0e71301e0f377548639bd"):
        run_here(stage("coco2014", base=server.url), Store(store.root + "2"), Choice("0"))


# --- webdataset


def test_tars_of_a_folder_with_captions_in_json(server, store, tmp_path):
    for n in range(3):
        (tmp_path / f"part-{n}.tar").write_bytes(upstream.wds_tar(upstream.samples(n, 2)))
    expected = [f"Picture <b>0</b> of tar {n}" for n in range(3)]
    for name, tars in (
        ("a", "part-*.tar"),
        ("b", "part-{0..2}.tar"),
        ("c", "part-{0,1}.tar part-2.tar"),
    ):
        root = Store(f"{store.root}-{name}")
        run_here(stage("webdataset", base=str(tmp_path), tars=tars, caption="json:caption"), root)
        assert [rows(root, "webdataset", f"{n:05d}")[0]["caption"] for n in range(3)] == expected
    trees = [tree(Path(f"{store.root}-{name}")) for name in "abc"]
    assert trees[0] == trees[1] == trees[2]


def test_local_names_are_taken_as_they_are(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c#").mkdir()
    (tmp_path / "c#" / "t#1.tar").write_bytes(upstream.wds_tar(upstream.samples(0, 2)))
    for number, tars in enumerate(("~/c#/t#1.tar", "~/c#/*.tar", f"{tmp_path}/c#/t#{{1..1}}.tar")):
        root = Store(f"{store.root}-{number}")
        run_here(stage("webdataset", tars=tars), root)
        assert len(rows(root, "webdataset", "00000")) == 2
    run_here(stage("webdataset", base="~/c#", tars="t#1.tar"), store)
    assert len(rows(store, "webdataset", "00000")) == 2


def test_a_parquet_beside_a_tar_goes_with_it(server, store):
    names = ("000000000", "000000001")
    server.files["t.tar"] = upstream.wds_tar(upstream.samples(0, 2))
    server.files["t.parquet"] = upstream.parquet([{"key": n, "TEXT": f"of {n}"} for n in names])
    run_here(stage("webdataset", tars=f"{server.url}/t.tar", caption="parquet:TEXT"), store)
    found = rows(store, "webdataset", "00000")
    assert [row["caption"] for row in found] == [f"of {n}" for n in names]
    assert [p.name for p in scratch().iterdir()] == []


def test_tars_behind_signed_links(server, store):
    server.files["t-0.tar"] = upstream.wds_tar(upstream.samples(0, 2))
    server.files["t-1.tar"] = upstream.wds_tar(upstream.samples(1, 2))
    tars = f"{server.url}/t-{{0,1}}.tar?token=s3cr3t"
    run_here(stage("webdataset", tars=tars), store)
    assert rows(store, "webdataset", "00001")[0]["caption"] == "Picture <b>0</b> of tar 1"
    assert b"s3cr3t" not in everything(Path(store.root))


def test_a_root_of_ours_is_a_webdataset_with_a_parquet_beside_each_tar(server, store, tmp_path):
    server.repos["pixparse/cc12m-wds"] = upstream.cc12m(1)
    first = Store(tmp_path / "first")
    run_here(stage("cc12m"), first, Choice("0"))
    tars = f"{first.root}/cc12m/images/0000{{0..0}}.tar"
    run_here(stage("webdataset", tars=tars, caption="parquet:caption"), store)
    again = rows(store, "webdataset", "00000")
    assert [row["caption"] for row in again] == [f"picture {n} of tar 0" for n in range(4)]
    assert stored(store, "webdataset", "00000") == stored(first, "cc12m", "00000")


def test_one_table_of_captions_for_all_tars(server, store, tmp_path):
    server.repos["me/mine"] = {
        "t-0.tar": upstream.wds_tar(upstream.samples(0, 2)),
        "t-1.tar": upstream.wds_tar(upstream.samples(1, 2)),
        "captions.parquet": upstream.parquet(
            [
                {"name": "000000000", "texts": ["first", "second"]},
                {"name": "000100001", "texts": []},
                {"name": "000100000", "texts": ["third"]},
            ]
        ),
    }
    wds = stage(
        "webdataset",
        tars="hf://datasets/me/mine/t-*.tar",
        caption="parquet:texts",
        sidecar="hf://datasets/me/mine/captions.parquet",
        sidecar_key="name",
        split="val",
    )
    run_here(wds, store)
    found = [row for n in "01" for row in rows(store, "webdataset", f"0000{n}")]
    assert [row["status"] for row in found] == ["success", "no-caption", "success", "no-caption"]
    assert [row["references"] for row in found] == [["first", "second"], None, None, None]
    inputs = commits(store, "webdataset")["00000"].inputs
    assert inputs["settings"]["hub"] == {"me/mine": COMMIT}
    assert commits(store, "webdataset")["00000"].split == "val"


DOTTED = [
    ("photo.1.jpg", 1),
    ("photo.1.txt", b"one"),
    ("photo.2.jpg", 2),
    ("photo.2.txt", b"two"),
    ("other.5.jpg", 3),
    ("other.5.txt", b"three"),
    ("plain.jpg", 4),
    ("plain.seg.png", 5),
    ("plain.txt", b"four"),
]


def dotted(path: Path) -> str:
    pairs = ((n, upstream.picture(d) if isinstance(d, int) else d) for n, d in DOTTED)
    path.write_bytes(upstream.tar(pairs))
    return str(path)


def test_names_with_dots_are_grouped_as_webdataset_groups_them(store, tmp_path):
    import webdataset

    tar = dotted(tmp_path / "t.tar")
    theirs = webdataset.WebDataset(tar, shardshuffle=False)  # pyright: ignore
    groups = [(s["__key__"], {k for k in s if k[:2] != "__"}) for s in theirs]  # pyright: ignore
    with open(tar, "rb"):
        ours = samples(archives.members(Path(tar)))
        assert [(s.stem, set(s.names)) for s in ours] == groups
    run_here(stage("webdataset", tars=tar), store)
    found = [(r["status"], r["caption"]) for r in rows(store, "webdataset", "00000")]
    assert found == [("several-pictures", None), ("success", "three"), ("success", "four")]
    kept = list(stored(store, "webdataset", "00000").values())
    assert kept == [upstream.picture(3), upstream.picture(4)]
    (reject,) = (r for r in rows(store, "webdataset", "00000") if r["status"] != "success")
    assert reject["error_message"].endswith("has 2: 1.jpg, 2.jpg; see name_ends, image")
    assert reject["url"] == f"{tar}/photo"


def test_names_with_dots_of_other_habits(store, tmp_path):
    tar = dotted(tmp_path / "t.tar")
    last = stage("webdataset", tars=tar, name_ends="last-dot")
    run_here(last, store)
    found = [(r["status"], r["caption"]) for r in rows(store, "webdataset", "00000")]
    assert found[:3] == [("success", "one"), ("success", "two"), ("success", "three")]
    assert "name_ends" in last.settings.decisive()
    assert "name_ends" not in stage("webdataset", tars=tar).settings.decisive()
    chosen = Store(tmp_path / "chosen")
    run_here(stage("webdataset", tars=tar, image="2.jpg"), chosen)
    assert [r["caption"] for r in rows(chosen, "webdataset", "00000")] == ["two", None, None]
    assert list(stored(chosen, "webdataset", "00000").values()) == [upstream.picture(2)]


def test_a_tar_that_is_one_sample_is_not_held_in_memory(tmp_path):
    members = ((f"photo.{n}.{e}", bytes(1000)) for n in range(50) for e in ("jpg", "txt"))
    (tmp_path / "t.tar").write_bytes(upstream.tar(members))
    (sample,) = samples(archives.members(tmp_path / "t.tar"))
    assert len(sample.names) == 100
    assert not sample.data


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["cats/0001", "dogs/0001", "dogs/0002"], ["cats/0001", "dogs/0001", "dogs/0002"]),
        (["0001", "0002"], [None, None, "0002"]),  # 0001 may be either
        (["0001", "0002", "0002"], [None, None, None]),
        (["dogs/0001", "0001"], [None, "dogs/0001", None]),
    ],
)
def test_a_table_of_captions_is_joined_by_the_whole_name(store, tmp_path, keys, expected):
    pictures = [("cats/0001.jpg", 1), ("dogs/0001.jpg", 2), ("dogs/0002.jpg", 3)]
    (tmp_path / "t.tar").write_bytes(upstream.tar((n, upstream.picture(d)) for n, d in pictures))
    texts = pa.array([f"of {key}" for key in keys]).dictionary_encode()
    pq.write_table(pa.table({"key": keys, "TEXT": texts}), tmp_path / "t.parquet")
    settings: dict[str, Any] = {"tars": str(tmp_path / "t.tar"), "caption": "parquet:TEXT"}
    wanted = [text and f"of {text}" for text in expected]
    run_here(Download("webdataset", WebDataset(**settings), max_reject_rate=1.0), store)
    assert [r["caption"] for r in rows(store, "webdataset", "00000")] == wanted
    # A table of all tars may mean another tar's sample.
    shared = WebDataset(**settings, sidecar=str(tmp_path / "t.parquet"))
    other = Store(tmp_path / "other")
    run_here(Download("webdataset", shared, max_reject_rate=1.0), other)
    found = [r["caption"] for r in rows(other, "webdataset", "00000")]
    assert found == [text if text and "/" in text else None for text in wanted]


def test_one_caption_that_is_no_utf8_costs_one_sample(store, tmp_path):
    tar = upstream.tar((f"{n}.jpg", upstream.picture(n)) for n in range(3))
    (tmp_path / "t.tar").write_bytes(tar)
    texts = pa.array([b"zero", b"caf\xe9", b"two"]).view(pa.string())
    pq.write_table(pa.table({"key": ["0", "1", "2"], "TEXT": texts}), tmp_path / "t.parquet")
    run_here(stage("webdataset", tars=str(tmp_path / "t.tar"), caption="parquet:TEXT"), store)
    found = [(r["status"], r["caption"]) for r in rows(store, "webdataset", "00000")]
    assert found == [("success", "zero"), ("caption-encoding", None), ("success", "two")]


def test_a_share_of_the_tars_is_held_out_by_their_names():
    def held(tars: str) -> set[str]:
        shards = WebDataset(tars=tars, holdout=0.1).shards()
        return {shard.spec[0] for shard in shards if shard.split == "heldout"}

    found = held("t-{000..299}.tar")
    assert 15 <= len(found) <= 45
    assert held("t-{150..299}.tar t-{000..099}.tar") == {
        t for t in found if not "100" <= t[2:5] < "150"
    }


def test_only_the_users_star_is_a_pattern(tmp_path):
    home = tmp_path / "set [1] {a}?"
    for name in ("a[0].tar", "ab.tar", "a?.tar"):
        (home / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "x" / name).touch()
    made = WebDataset(tars="x/a*.tar", base=str(home))
    assert [s.spec[0] for s in made.shards()] == ["x/a?.tar", "x/a[0].tar", "x/ab.tar"]
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/s/b[1]/x{n}/a[{n}]?.tar": b"" for n in range(2)} | {"/s/b1/x0/a0.tar": b""})
    try:
        made = WebDataset(tars="memory:///s/b[1]/x*/a*.tar")
        names = [f"memory:///s/b[1]/x{n}/a[{n}]?.tar" for n in range(2)]
        assert [s.spec[0] for s in made.shards()] == names
    finally:
        memory.rm("/s", recursive=True)


def test_what_is_no_sample_is_a_reject_with_its_reason(server, store, tmp_path):
    good = upstream.picture(1)
    members = [
        ("0001.jpg", good),
        ("0001.txt", b"good"),
        ("0002.jpg", upstream.picture(2)),
        ("0003.txt", b"a caption alone"),
        ("0004.jpg", upstream.picture(4)),
        ("0004.txt", b" \n"),
        ("0005.jpg", upstream.picture(5)),
        ("0005.pickle", b"\x80\x04N."),
        ("0001.png", upstream.picture(6, form="PNG")),
        ("../0007.jpg", good),
        ("._0008.jpg", b"a fork"),
        ("0009.PNG", upstream.picture(9, form="PNG")),
        ("0009.txt", "\ufeffÜber".encode()),
        ("0009.json", b"[" * 100_000),
        ("0010.jpg", b""),
        ("0010.txt", b"a picture of no bytes"),
    ]
    (tmp_path / "t.tar").write_bytes(upstream.tar(members))
    run_here(stage("webdataset", tars=str(tmp_path / "t.tar")), store)
    found = rows(store, "webdataset", "00000")
    assert [(row["key"][-1], row["status"]) for row in found] == [
        ("0", "success"),
        ("1", "no-caption"),
        ("2", "no-picture"),
        ("3", "no-caption"),
        ("4", "unsafe-member"),
        ("5", "unsafe-member"),
        ("6", "unsafe-member"),
        ("7", "success"),
        ("8", "undecodable"),
    ]
    details = {row["key"][-1]: row["error_message"] for row in found}
    assert details["4"] == "'0005.pickle': a pickle"
    assert details["5"] == "'0001.png': its sample's other files lie elsewhere in the tar"
    assert found[-2]["caption"] == "Über"


def test_only_the_keys_that_are_asked_for(server, store):
    server.repos["pixparse/cc12m-wds"] = upstream.cc12m(1)
    cc12m = stage("cc12m")
    list(cc12m.plan(Catalog(store)))
    (shard, *_) = cc12m.settings.shards()
    found = list(cc12m.settings.fetch(shard, frozenset(["000000002"])))
    assert [item.ref.key for item in found] == ["000000002"]  # pyright: ignore


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tars": "t-*.tar", "base": "/nowhere"}, r"tars=t-\*.tar: there are none"),
        ({"tars": "t-{0..1}.tar", "sidecar": "x.parquet"}, "needs caption=parquet:COLUMN"),
        (
            {"tars": "{0..2}.tar", "sidecar": "{0..1}.parquet", "caption": "parquet:c"},
            "2 for 3 tars",
        ),
        ({"tars": "t-{0..1.tar"}, "t-"),
        ({"tars": "{0..999999}.tar"}, "over 100000 files"),
        ({"tars": "https://me:s3cr3t@host/t.tar"}, "must hold no user"),
        ({"tars": "t.tar", "base": "https://host/?s3cr3t"}, "must hold no user"),
        ({"tars": "nothing://x/*.tar"}, "cannot be listed: .*Protocol not known"),
        ({"tars": "t.tar", "caption": "json:"}, "caption"),
    ],
)
def test_settings_of_tars_that_cannot_be_used(settings, message):
    with pytest.raises(SettingError, match=message):
        stage("webdataset", **settings).settings.shards()


def test_more_samples_than_digits(server, store, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources.files.archives.is_picture", lambda name: False)
    members = ((f"{n:06d}.txt", b"") for n in range(10_001))
    (tmp_path / "t.tar").write_bytes(upstream.tar(members))
    with pytest.raises(SettingError, match=r"more than 10000 samples; set digits=5"):
        run_here(stage("webdataset", tars=str(tmp_path / "t.tar")), store)


# --- Through the command, with processes that die


@pytest.mark.slow
def test_a_run_that_is_killed_in_a_transfer_goes_on_where_it_was(server, tmp_path):
    server.repos["pixparse/cc12m-wds"] = upstream.cc12m(2)
    size = len(server.repos["pixparse/cc12m-wds"]["cc12m-train-0001.tar"])
    held = server.fault(path="0001.tar", hold=size // 2)
    root = tmp_path / "root"
    command = [PIPELINE, "run", "download", "--source", "cc12m", "--root", str(root)]
    command += ["--shards", "0-1", "--workers", "1"]
    with subprocess.Popen(
        command,
        env={**os.environ, **server.environment()},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert held.begun.wait(120)
        _wait_for(lambda: any(p.stat().st_size == size // 2 for p in scratch().glob("*.part")))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (root / "cc12m/images/commits/00001.json").exists()
    result = subprocess.run(
        command, env={**os.environ, **server.environment()}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert f"bytes={size // 2}-" in [r.headers.get("range") for r in server.requests("0001.tar")]
    undisturbed = Store(tmp_path / "undisturbed")
    run_here(stage("cc12m"), undisturbed, Choice("0-1"))
    assert tree(root) == tree(Path(undisturbed.root))


@pytest.mark.slow
def test_a_run_without_leave_ends_with_one_line(server, tmp_path):
    server.repos["JourneyDB/JourneyDB"] = upstream.journeydb({"train": {0: ["a"]}})
    server.gated.add("JourneyDB/JourneyDB")
    command = [PIPELINE, "run", "download", "--source", "journeydb", "--root", str(tmp_path / "r")]
    result = subprocess.run(
        [*command, "--shards", "0", "--workers", "1"],
        env={**os.environ, **server.environment(), "HF_TOKEN": "hf_wrong_token"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("pipeline: JourneyDB/JourneyDB is gated: ")
    assert "Traceback" not in result.stderr
    assert "hf_wrong_token" not in result.stdout + result.stderr


def _wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_tars_on_s3(tmp_path, monkeypatch):
    from tests.pipeline.helpers.s3 import BUCKET, S3Server, variables

    pytest.importorskip("s3fs")
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path / "scratch"))
    monkeypatch.setattr("pipeline.sources.files.transfer_store.BLOCK", 5000)
    with S3Server(tmp_path / "s3") as s3, variables(s3.environment()):
        for n in range(2):
            data = upstream.wds_tar(upstream.samples(n))
            s3.client().put_object(Bucket=BUCKET, Key=f"tars/t-{n}.tar", Body=data)
        base = f"s3://{BUCKET}/tars"
        on_s3, here = Store(f"s3://{BUCKET}/root"), Store(tmp_path / "root")
        run_here(stage("webdataset", tars="t-*.tar", base=base), on_s3)
        run_here(stage("webdataset", tars="t-{0..1}.tar", base=base), here)
        for n in range(2):
            shard = f"0000{n}"
            assert stored(here, "webdataset", shard) == stored(on_s3, "webdataset", shard)
            assert [r["url"] for r in rows(here, "webdataset", shard)] == [
                f"http://web/{s.key}.jpg" for s in upstream.samples(n)
            ]
        # A protocol's second name: listings come back under the first one.
        (first, *_) = WebDataset(tars=f"s3a://{BUCKET}/tars/t-*.tar").shards()
        assert first.spec == (f"s3a://{BUCKET}/tars/t-0.tar",)
        with pytest.raises(TransferError, match=r"t-2.tar: there is no such file"):
            run_here(stage("webdataset", tars="t-2.tar", base=base), Store(tmp_path / "other"))
        with pytest.raises(TransferError), transfer.local(f"s3://{BUCKET}/tars"):
            pass


def test_yamls_say_what_their_sources_take():
    for name in ("cc12m", "sa1b", "journeydb", "diffusiondb", "coco2014", "webdataset"):
        config = load_config(name, Path("yamls", "data", f"{name}.yaml"), {})
        assert config.source == name
        assert json.dumps(build_stage("download", config).groups())

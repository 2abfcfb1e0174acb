"""Groups of earlier versions are stale in the shards that hold what this version mends, no more."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.commands.status import collect
from pipeline.core.catalog import Catalog
from pipeline.core.commits import read_commit, read_commits, write_shard
from pipeline.core.images import read_pixels
from pipeline.core.mends import ANSWERS, COLOURS, METADATA, PIXELS, REASONS
from pipeline.core.rules import Rules
from pipeline.core.samples import ImageRef, ImageSample, InputShard, Reject
from pipeline.core.stage import Stage
from pipeline.core.store import Store, fingerprint
from pipeline.core.tables import from_parquet, to_parquet
from pipeline.dropping.purge_shard import purge_shard
from pipeline.engine.plan import Choice, plan
from pipeline.sources.folder import Folder
from pipeline.stages.caption import _SCHEMA, CaptionStage
from pipeline.stages.download import Download
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings
from pipeline.stages.images import stored_samples, write_images
from tests.pipeline.core.test_colour import bmp32
from tests.pipeline.core.test_images import blobs, encoded
from tests.pipeline.core.test_metadata import SECRET, exif
from tests.pipeline.helpers import profiles
from tests.pipeline.helpers.roots import run_here

KEEP = Rules(min_image_size=0, image_size=64, metadata="keep")  # as earlier versions did
STRIP = Rules(min_image_size=0, image_size=64)
ALL = Choice(stale=True)
PLAIN, WHERE, COLOUR = "00000", "00001", "00002"  # shards of one picture each


def picture(number: int, **options) -> bytes:
    image = blobs(64, 64).rotate(90 * number)
    return encoded(image, "JPEG", quality=90, **options)


@pytest.fixture
def home(tmp_path) -> Path:
    home = tmp_path / "pictures"
    home.mkdir()
    (home / "a.jpg").write_bytes(picture(0))
    (home / "b.jpg").write_bytes(picture(1, exif=exif(None)))
    (home / "c.jpg").write_bytes(picture(2, icc_profile=profiles.rgb()))
    return home


def download(home: Path, rules: Rules = STRIP, number: int = 1) -> Download:
    settings = Folder(folder=str(home), captions="none", samples_per_shard=number)
    return Download("x", settings, rules=rules)  # pyright: ignore


def stages(home: Path) -> list[Stage]:
    settings = EncodeSettings("tiny4", "tiny-clip", (64,), captions="colour")
    return [download(home), CaptionStage("x", "colour"), Encode("x", settings)]


def age(store: Store) -> None:
    """Every commit as an earlier version wrote it."""
    for entry in [*store.walk("x")]:
        if "/commits/" in entry.path:
            record = store.read_json(entry.path)
            record["counters"].pop("mends")
            store.write_json(entry.path, record)


@pytest.fixture
def old(tmp_path, home) -> Store:
    """A root of an earlier version."""
    store = Store(tmp_path / "root")
    for stage in [download(home, KEEP), *stages(home)[1:]]:
        run_here(stage, store)
    for entry in [*store.walk("x/images/commits")]:  # that rule was not there yet
        record = store.read_json(entry.path)
        del record["inputs"]["rules"]["metadata"]
        record["fingerprint"] = fingerprint(record["inputs"])
        store.write_json(entry.path, record)
    age(store)
    return store


def stale(store: Store, stage: Stage) -> dict[str, dict[str, int]]:
    return {g: dict(p.stale) for g, p in plan(stage, Catalog(store)).groups.items() if p.stale}


def pending(store: Store, stage: Stage) -> dict[str, tuple[str, ...]]:
    return plan(stage, Catalog(store), ALL).pending


def files(store: Store) -> dict[str, bytes]:
    return {e.path: store.read(e.path) for e in store.walk("x") if "/looked/" not in e.path}


LATENTS = "x/latents/tiny4/64"


def test_only_shards_with_such_pictures_are_stale_and_say_why(old, home):
    images, captions, encode = stages(home)
    assert stale(old, images) == {"x/images": {REASONS[METADATA]: 1}}
    assert pending(old, images) == {WHERE: ("x/images",)}
    assert stale(old, captions) == {"x/captions/colour": {REASONS[COLOURS]: 1}}
    assert pending(old, captions) == {COLOUR: ("x/captions/colour",)}
    assert stale(old, encode) == {LATENTS: {REASONS[COLOURS]: 1}}
    assert pending(old, encode) == {COLOUR: (LATENTS,)}
    shown = {row.group: row.stale for row in collect(str(old.root))}  # no YAML asks for them
    assert shown["images"] == {REASONS[METADATA]: 1}
    assert shown["latents/tiny4/64"] == shown["captions/colour"] == {REASONS[COLOURS]: 1}
    assert not any(row for group, row in shown.items() if group.startswith("text"))


def test_stale_redoes_them_alone_and_nothing_is_left(old, home):
    before = files(old)
    latents = {s: c.content() for s, c in read_commits(old, LATENTS).items()}
    assert [run_here(stage, old, ALL) for stage in stages(home)] == [1, 1, 1]
    assert not any(stale(old, stage) for stage in stages(home))
    assert [run_here(stage, old, ALL) for stage in stages(home)] == [0, 0, 0]
    after = files(old)
    for path, data in before.items():
        if "/commits/" not in path and not path.endswith((".json", ".gz")):
            assert after[path] == data  # no committed file was overwritten
        elif PLAIN in path and "_stats" not in path:
            assert after[path] == data
    # Latents of pictures that lost their metadata are what they were, and are known to be.
    now = {s: c.content() for s, c in read_commits(old, LATENTS).items()}
    assert now[WHERE] == latents[WHERE]
    commit = read_commit(old, "x/images", WHERE)
    assert commit is not None
    tar = old.read(f"x/images/{commit.file('.tar')}")
    assert SECRET not in tar
    assert SECRET in before[f"x/images/{WHERE}.tar"]
    table = from_parquet(old.read(f"x/images/{commit.file('.parquet')}"))
    (sample,) = stored_samples(old, "x/images", commit)
    assert table["sha256"].to_pylist() == [sample.sha256]


def test_a_picture_loses_its_metadata_though_its_source_is_gone(old, home):
    """The link may be dead by now: what is stored is enough."""
    stage = download(home)
    catalog = Catalog(old)
    jobs = [*plan(stage, catalog, ALL).jobs(stage, catalog)]
    (home / "b.jpg").unlink()
    work = stage.open(old)
    work(jobs[0])
    assert work.take_counters()["shards fetched"] == 0
    commit = read_commit(old, "x/images", WHERE)
    assert commit is not None
    assert commit.samples == 1


def test_what_was_looked_at_is_remembered_and_new_roots_are_not_looked_at(
    old, home, tmp_path, monkeypatch
):
    for stage in stages(home):
        stale(old, stage)
    assert sorted(old.names("x/looked")) == ["captions+colour.json", "images.json"]
    monkeypatch.setattr("pipeline.stages.looks.read_file", lambda *_: pytest.fail("looked again"))
    for stage in stages(home):
        stale(old, stage)
    new = Store(tmp_path / "new")
    for stage in stages(home):
        run_here(stage, new)
        assert not stale(new, stage)
    assert new.names("x/looked") == []


def test_a_damaged_record_is_made_anew(old, home):
    first = stale(old, download(home))
    for damaged in (b"", b"[]", b'{"schema": 1}', b'{"schema": 9, "shards": {}}'):
        old.write("x/looked/images.json", damaged)
        assert stale(old, download(home)) == first


def test_to_keep_metadata_makes_old_shards_no_more_stale_than_before(old, home):
    assert stale(old, download(home, KEEP)) == {}
    run_here(download(home), old, ALL)
    changed = stale(old, download(home, KEEP))["x/images"]
    assert sum(changed.values()) == 1  # the one that this version made
    run_here(download(home, KEEP), old, ALL)
    assert stale(old, download(home, KEEP)) == {}


def test_from_keep_to_strip_nothing_is_fetched(tmp_path, home):
    store = Store(tmp_path / "root")
    run_here(download(home, KEEP), store)
    stage = download(home)
    contents = {s: c.content() for s, c in read_commits(store, "x/images").items()}
    catalog = Catalog(store)
    work = stage.open(store)
    for job in plan(stage, catalog, ALL).jobs(stage, catalog):
        work(job)
    assert work.take_counters()["shards fetched"] == 0
    assert {s: c.content() for s, c in read_commits(store, "x/images").items()} == contents
    assert not stale(store, stage)


def test_shrunk_pictures_of_a_local_folder_are_told_by_the_files(old, home, tmp_path):
    (home / "c.jpg").write_bytes(encoded(blobs(96, 96), "JPEG", icc_profile=profiles.rgb()))
    store = Store(tmp_path / "other")
    for stage in stages(home):
        run_here(stage, store)
    age(store)
    images, _, encode = stages(home)
    assert stale(store, images) == {"x/images": {REASONS[PIXELS]: 1}}
    assert pending(store, images) == {COLOUR: ("x/images",)}
    assert not stale(store, encode)
    run_here(images, store, ALL)
    assert not stale(store, images)


def test_white_and_black_pictures_are_fetched_again_with_their_duplicates(tmp_path):
    home = tmp_path / "pictures"
    home.mkdir()
    (home / "a.bmp").write_bytes(bmp32(0))
    (home / "b.bmp").write_bytes(bmp32(0)[:-4000] + bytes(4000))
    (home / "c.jpg").write_bytes(picture(0))
    stage, store = download(home, number=3), Store(tmp_path / "root")
    catalog = Catalog(store)
    (job,) = plan(stage, catalog).jobs(stage, catalog)
    white = encoded(Image.new("RGB", (48, 32), "white"), "PNG")
    items = [
        ImageSample(ImageRef("000000000", "a.bmp", ""), white, "png", 48, 32, 48, 32),
        Reject("000000001", "download", "duplicate", "the same as 000000000"),
        ImageSample(ImageRef("000000002", "c.jpg", ""), picture(0), "jpg", 64, 64, 64, 64),
    ]
    write_images(store, "x/images", job.shard, job.groups["x/images"], items, 0.0)
    age(store)
    assert stale(store, stage) == {"x/images": {REASONS[PIXELS]: 1}}
    run_here(stage, store, ALL)
    commit = read_commit(store, "x/images", "00000")
    assert commit is not None
    found = {s.ref.key: s for s in stored_samples(store, "x/images", commit)}
    assert [*found] == ["000000000", "000000001", "000000002"]
    assert found["000000002"].data == picture(0)
    assert len({s.sha256 for s in found.values()}) == 3
    assert np.ptp(read_pixels(found["000000000"].data)) > 100
    assert commit.rejects == {}
    assert not stale(store, stage)


def test_texts_that_are_no_captions_make_their_shard_stale(tmp_path, home):
    store = Store(tmp_path / "root")
    images, captions, encode = stages(home)
    run_here(images, store)
    catalog = Catalog(store)
    texts = {PLAIN: "A red square.", WHERE: "<think>hm</think>A cat.", COLOUR: "A cat.<|im_end|>"}
    for job in plan(captions, catalog).jobs(captions, catalog):
        (inputs,) = job.groups.values()
        row = {"key": f"{job.shard.id}0000", "caption": texts[job.shard.id], "number": 0}
        table = pa.Table.from_pylist([row], schema=_SCHEMA)
        named = {f"{job.shard.id}.parquet": to_parquet(table)}
        shard = InputShard(job.shard.id, "train")
        write_shard(store, "x/captions/colour", shard, inputs, {**named}, [row["key"]], [])
    run_here(encode, store)
    age(store)
    why = REASONS[ANSWERS]
    seen = REASONS[COLOURS]
    assert stale(store, captions) == {"x/captions/colour": {why: 1, f"{why}; {seen}": 1}}
    assert [*pending(store, captions)] == [WHERE, COLOUR]
    run_here(captions, store, ALL)
    assert not stale(store, captions)
    assert "x/text/tiny-clip/colour.full" in stale(store, encode)  # what was made of them


def test_a_server_gets_the_file_itself_only_where_it_would_see_the_same(tmp_path, home):
    store, captions = Store(tmp_path / "root"), CaptionStage("x", "colour")
    run_here(download(home, number=3), store)
    catalog = Catalog(store)
    (job,) = plan(captions, catalog).jobs(captions, catalog)
    (group,) = captions.groups()
    given = [picture.data for picture in captions.open(store)._pictures(job, group, {})]
    assert [data is None for data in given] == [False, False, True]


def test_a_purge_after_it_names_the_pictures_that_are_left(tmp_path, home):
    store, encode = Store(tmp_path / "root"), stages(home)[2]
    run_here(download(home, KEEP, 3), store)
    run_here(CaptionStage("x", "colour"), store)
    run_here(encode, store)
    run_here(download(home, number=3), store, ALL)
    before = read_commit(store, "x/images", "00000")
    assert before is not None
    assert before.reads_as
    purge_shard(store, ["x/images", LATENTS], "00000", frozenset({"000000001"}))
    images, latents = (read_commit(store, g, "00000") for g in ("x/images", LATENTS))
    assert images is not None
    assert latents is not None
    assert images.samples == latents.samples == 2
    assert before.reads_as != images.content() == latents.inputs["images"]


def test_a_large_old_root_says_that_it_is_looked_through(old, home, monkeypatch):
    monkeypatch.setattr("pipeline.core.mends.SAY_EVERY_S", 0.0)
    lines: list[str] = []
    plan(download(home), Catalog(old, lines.append))
    assert "x/images was made by an earlier version" in lines[0]
    assert "3 of 3 shards" in lines[-1]


def test_a_shard_without_metadata_says_so_to_older_versions(old, home):
    """They could not tell that its latents are good."""
    run_here(download(home), old, ALL)
    record = old.read_json(f"x/images/commits/{WHERE}.json")
    assert record["schema"] == 2
    assert record["reads_as"]
    assert old.read_json(f"x/images/commits/{PLAIN}.json")["schema"] == 1
    assert "reads_as" not in json.dumps(old.read_json(f"x/images/commits/{PLAIN}.json"))
    with tarfile.open(fileobj=io.BytesIO(old.read(f"x/images/{PLAIN}.tar"))) as tar:
        assert len(tar.getnames()) == 3

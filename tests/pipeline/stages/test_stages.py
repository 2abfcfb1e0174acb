"""The three stages in process: real pictures, real small encoders, files as the design says."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.core import layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import Commit, read_commits, write_shard
from pipeline.core.errors import BrokenShard, SettingError, TooManyRejects
from pipeline.core.images import decode, fit
from pipeline.core.latents import to_model, to_raw
from pipeline.core.manifest import read_manifest
from pipeline.core.rules import keep
from pipeline.core.samples import ImageRef, ImageSample, InputShard, RawImage, Reject
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.encoders import find_vae, load_text, load_vae
from pipeline.engine.plan import Choice, plan
from pipeline.sources.openmoji import BACKGROUNDS, render
from pipeline.stages.download import Download
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings
from pipeline.stages.images import read_images, write_images
from tests.pipeline.helpers.roots import SETTINGS, mds_rows, pictures, run_here, tree

ENCODE = EncodeSettings(
    vae="tiny4",
    text_encoder="tiny-clip",
    resolutions=(64,),
    captions="alt:0.5,colour:0.5",
    text="trimmed",
    batch_size=4,
)
IMAGES = "openmoji/images"
LATENTS = "openmoji/latents/tiny4/64"
TEXT = "openmoji/text/tiny-clip/alt-0.5+colour-0.5.trimmed"


def encode(store: Store, choice: Choice | None = None, **changes) -> int:
    return run_here(stage(**changes), store, choice)


def stage(max_reject_rate: float = 0.9, **changes) -> Encode:
    settings = EncodeSettings(**{**ENCODE.__dict__, **changes})
    return Encode("openmoji", settings, max_reject_rate)


def images_of(store: Store, shard: str = "00000") -> Commit:
    return read_commits(store, IMAGES)[shard]


def test_downloaded_tars_follow_img2dataset(downloaded):
    folder = Path(downloaded.url(IMAGES))
    stats = json.loads((folder / "00000_stats.json").read_text())
    assert stats["count"] == stats["successes"] == stats["status_dict"]["success"]
    with tarfile.open(folder / "00000.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:3]] == ["000000000.png", "000000000.txt", "000000000.json"]
    assert {m.mtime for m in members} == {0}
    rows = from_parquet(downloaded.read(f"{IMAGES}/00000.parquet")).to_pylist()
    assert [row["key"] for row in rows] == [m.name[:-4] for m in members if m.name.endswith("png")]
    assert rows[0]["status"] == "success"
    assert rows[0]["split"] == "train"
    assert (rows[0]["width"], rows[0]["original_height"]) == (64, 64)


def test_the_webdataset_library_reads_the_tars(downloaded):
    import webdataset

    url = downloaded.url(f"{IMAGES}/00000.tar")
    found = list(webdataset.WebDataset(url, shardshuffle=False))
    stored = list(read_images(downloaded, IMAGES, images_of(downloaded)))
    assert [sample["__key__"] for sample in found] == [image.key for image in stored]
    assert found[0]["png"] == stored[0].data
    assert found[0]["txt"].decode() == stored[0].caption


def test_encode_makes_groups_that_streaming_opens(downloaded, tmp_path):
    from streaming import StreamingDataset

    assert encode(downloaded) == 2
    for group, column in ((LATENTS, "latent"), (TEXT, "tokens")):
        dataset = StreamingDataset(local=downloaded.url(group), batch_size=1, shuffle=False)
        assert dataset[0][column].dtype == np.float16
        manifest = read_manifest(downloaded, group)
        assert manifest.samples == 6
        assert sum(manifest.splits.values()) == 6
        assert set(manifest.splits) == {"train", "heldout"}
    index = downloaded.read_json(f"{TEXT}/index.json")
    for record in index["inputs"]:
        keys = from_parquet(downloaded.read(f"{TEXT}/{record['keys']}"))
        assert keys.column_names == ["key", "row"]


def test_latents_equal_the_vae_called_directly(downloaded):
    encode(downloaded)
    vae = load_vae("tiny4")
    rows = {row["key"]: row["latent"] for row in mds_rows(downloaded, LATENTS)}
    images = list(read_images(downloaded, IMAGES, images_of(downloaded)))[:4]
    torch.set_num_threads(1)
    pixels = np.stack([fit(decode(image.data), 64) for image in images])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        direct = vae.vae.encode(x, return_dict=False)[0].mean.numpy()
    stored = np.stack([rows[image.key] for image in images])
    np.testing.assert_array_equal(stored, direct.astype(np.float16))


def test_text_vectors_equal_open_clips_own_and_are_stored_once(downloaded):
    encode(downloaded)
    text: Any = load_text("tiny-clip")
    rows = mds_rows(downloaded, TEXT)
    tokens, lengths = text.encode([row["caption"] for row in rows])
    for row, vectors, length in zip(rows, tokens, lengths.tolist(), strict=True):
        assert row["tokens"].shape == (length, text.facts.width)
        np.testing.assert_allclose(row["tokens"], vectors[:length].numpy(), atol=2e-3, rtol=1e-3)
    # The pooled embedding of open_clip is the end-of-text row through its projection.
    last = tokens[torch.arange(len(rows)), lengths - 1]
    with torch.no_grad():
        pooled = last @ text.model.text_projection
        expected = text.model.encode_text(text.tokenizer([row["caption"] for row in rows]))
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4)
    by_shard = [c.counters["distinct_captions"] for c in read_commits(downloaded, TEXT).values()]
    assert sum(by_shard) == len(rows)


def test_full_text_keeps_every_row(downloaded):
    encode(downloaded, text="full")
    group = layout.text_group("openmoji", "tiny-clip", ENCODE.captions, "full")
    assert {row["tokens"].shape for row in mds_rows(downloaded, group)} == {(32, 128)}


@pytest.mark.parametrize("name", ["tiny4", "tiny16"])
def test_what_a_shipped_vae_decodes_looks_like_the_picture(name):
    vae = load_vae(name)
    pixels = fit(decode(render("avocado", 128, BACKGROUNDS["blue"])), 128)[None]
    latent = vae.encode(pixels)
    model_form = to_model(latent, vae.facts)
    assert 0.3 < float(model_form.std()) < 3
    torch.testing.assert_close(to_raw(model_form, vae.facts), latent)
    error = vae.decode(latent).astype(float) - pixels
    assert 20 * np.log10(255 / np.sqrt((error**2).mean())) > 24


def test_a_rerun_does_nothing_and_a_new_group_touches_no_other(downloaded):
    encode(downloaded)
    before = tree(Path(downloaded.root))
    assert encode(downloaded) == 0
    assert tree(Path(downloaded.root)) == before
    assert encode(downloaded, captions="alt") == 2  # a new text group; latents are there
    after = tree(Path(downloaded.root))
    assert {name: after[name] for name in before} == before
    assert all("/text/tiny-clip/alt.trimmed/" in name for name in after.keys() - before.keys())


def test_only_the_encoders_that_are_needed_are_loaded(downloaded, monkeypatch):
    encode(downloaded)
    fail = lambda name, *_: pytest.fail(name)  # noqa: E731
    monkeypatch.setattr("pipeline.encoders.autoencoder.load_vae", fail)
    assert encode(downloaded, captions="colour") == 2


def test_changed_settings_make_shards_stale_and_say_why(downloaded):
    encode(downloaded)
    changed = stage(batch_size=3)
    todo = plan(changed, Catalog(downloaded))
    assert not todo.pending
    assert todo.groups[LATENTS].stale == {"batch_size: 4 -> 3": 2}
    assert (todo.groups[LATENTS].done, todo.groups[LATENTS].left) == (0, 0)
    assert len(plan(changed, Catalog(downloaded), Choice(stale=True)).pending) == 2


def test_pictures_that_were_redone_make_what_was_made_of_them_stale(downloaded):
    encode(downloaded)
    redo = Choice(force=True)
    assert run_here(Download("openmoji", SETTINGS), downloaded, redo) == 2
    assert encode(downloaded, Choice(stale=True)) == 0  # the same bytes: nothing depends on how
    larger = SETTINGS.model_copy(update={"size": 72})
    assert run_here(Download("openmoji", larger), downloaded, Choice("00001", stale=True)) == 1
    todo = plan(stage(), Catalog(downloaded))
    assert todo.groups[LATENTS].stale == {"images were made anew": 1}
    # A reader of the old generation still finds its files; the new one has names of its own.
    assert downloaded.exists(f"{IMAGES}/00001.tar")
    assert images_of(downloaded, "00001").file(".tar") != "00001.tar"


def test_a_tar_that_is_not_the_committed_one_is_not_read(downloaded):
    data = downloaded.read(f"{IMAGES}/00000.tar")
    downloaded.write(f"{IMAGES}/00000.tar", data[:-512])
    with pytest.raises(BrokenShard, match=r"00000.tar has .*pipeline verify --repair --source"):
        encode(downloaded)
    downloaded.delete(f"{IMAGES}/00000.tar")
    with pytest.raises(BrokenShard, match=r"00000.tar is missing"):
        encode(downloaded)


def test_choices_of_shards(downloaded):
    assert encode(downloaded, Choice("1")) == 1
    assert list(read_commits(downloaded, LATENTS)) == ["00001"]
    assert encode(downloaded, Choice("00000-00099")) == 1
    assert encode(downloaded, Choice("0", force=True)) == 1
    for text in ("00007", "x-", "1,-2"):
        with pytest.raises(SettingError, match="--shards"):
            plan(stage(), Catalog(downloaded), Choice(text))


def test_new_input_shards_are_picked_up(tmp_path):
    store = Store(tmp_path)
    download = Download("openmoji", SETTINGS)
    run_here(download, store, Choice("00000"))
    assert encode(store, captions="alt") == 1
    run_here(download, store)
    assert encode(store, captions="alt") == 1
    assert read_manifest(store, LATENTS).shards == 2


def test_an_unreadable_picture_is_a_counted_reject_everywhere(tmp_path):
    store = Store(tmp_path)
    shard = InputShard("00000", "train")
    good = pictures()
    bad = ImageSample(
        ImageRef("000009999", "https://me:s3@h/a b.png?s3cr3t", "a ruin"),
        b"\x89PNG broken",
        "png",
        1,
        1,
        1,
        1,
    )
    # Found at download ...
    found = keep(RawImage(bad.ref, bad.data), SETTINGS.rules)
    assert isinstance(found, Reject)
    assert found.reason == "undecodable"
    # ... and, where a tar was made elsewhere, in every later stage.
    write_images(store, IMAGES, shard, {"stage": "download"}, [*good, bad], 0.0)
    from pipeline.stages.caption import CaptionStage

    run_here(CaptionStage("openmoji", "colour"), store)
    encode(store, captions="colour")
    for group in ("openmoji/captions/colour", LATENTS):
        (commit,) = read_commits(store, group).values()
        assert commit.rejects == {"undecodable": 1}
        assert commit.samples == len(good)
        (row,) = rejects_of(store, group, commit)
        assert row["key"] == "000009999"
        assert "cannot identify" in row["detail"]
        assert row["place"] == "https://h/a b.png"  # which one it was, and nothing secret
    text = layout.text_group("openmoji", "tiny-clip", "colour", "trimmed")
    (commit,) = read_commits(store, text).values()
    assert commit.rejects == {"no-caption": 1}
    assert rejects_of(store, text, commit)[0]["place"] == "https://h/a b.png"


def rejects_of(store: Store, group: str, commit: Commit) -> list[dict[str, Any]]:
    (name,) = (name for name in commit.files if name.startswith("rejects/"))
    return from_parquet(store.read(f"{group}/{name}")).to_pylist()


def test_a_shard_of_rejects_is_committed_only_where_that_is_expected(tmp_path):
    store = Store(tmp_path)
    bad = ImageSample(ImageRef("000000000", "x:", "a ruin"), b"nothing", "png", 1, 1, 1, 1)
    write_images(store, IMAGES, InputShard("00000", "train"), {}, [bad], 0.0)
    with pytest.raises(TooManyRejects, match=r"1 of 1 samples rejected \(1 undecodable"):
        encode(store, captions="alt")
    assert read_commits(store, LATENTS) == {}
    run_here(stage(max_reject_rate=1.0, captions="alt"), store)
    (commit,) = read_commits(store, LATENTS).values()
    assert (commit.samples, commit.index, commit.rejects) == (0, None, {"undecodable": 1})
    assert store.read_json(f"{LATENTS}/index.json")["shards"] == []


def test_captions_that_nobody_wrote_name_the_command(downloaded):
    with pytest.raises(
        SettingError,
        match=r"pipeline run caption --source openmoji` .* captions are there by colour",
    ):
        plan(stage(captions="x"), Catalog(downloaded))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": "tiny5"}, 'mean "tiny4"'),
        ({"text_encoder": "tinyclip"}, 'mean "tiny-clip"'),
        ({"resolutions": (100,)}, "multiple of 8"),
        ({"text": "ful"}, "one of full, trimmed"),
        ({"vae": "sdxl"}, "pipeline fetch sdxl"),
        ({"text_encoder": "dfn5b-h14"}, "pipeline fetch dfn5b-h14"),
    ],
)
def test_settings_that_cannot_be_used(changes, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SettingError, match=message) as error:
        Encode("openmoji", EncodeSettings(**{**ENCODE.__dict__, **changes}))
    assert "\n" not in str(error.value)


def test_a_vae_folder_that_misses_a_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingError, match=r"diffusion_pytorch_model\.safetensors is missing"):
        Encode("openmoji", EncodeSettings(**{**ENCODE.__dict__, "vae": str(tmp_path)}))


def test_a_vae_that_lacks_some_of_its_weights(tmp_path: Path):
    """diffusers would fill them with random numbers, and warn."""
    folder = tmp_path / "vae"
    shutil.copytree(find_vae("tiny4")[1], folder)
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, path)
    with pytest.raises(SettingError, match=r"lacks 1 of its tensors \(first: encoder.conv_in.bias"):
        load_vae(str(folder))


def test_download_inputs_hold_the_settings_that_decide_a_shard():
    (job, *_) = Download("openmoji", SETTINGS).plan(Catalog(Store("/nowhere")))
    assert job.groups[IMAGES]["settings"] == {"size": 64}


def test_commits_of_other_groups_are_not_read(downloaded):
    write_shard(downloaded, "other/images", InputShard("9", "train"), {}, {}, [], [])
    assert "9" not in read_commits(downloaded, IMAGES)

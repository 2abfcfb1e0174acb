"""The official single MDS: written from column groups, and read into them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import merge_index

from pipeline.commands.status import collect
from pipeline.commands.verify import select, verify
from pipeline.core import drops, facts, layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import read_commits
from pipeline.core.errors import BrokenShard, SettingError
from pipeline.core.manifest import OfficialManifest, VaeFacts, read_manifest
from pipeline.core.store import Store, fingerprint
from pipeline.core.tables import from_parquet
from pipeline.core.tokens import dequantise
from pipeline.dropping.prune import find
from pipeline.encoders import VAES, vae_facts
from pipeline.engine.inventory import groups_of
from pipeline.engine.plan import Choice, plan
from pipeline.official import layout as official
from pipeline.official.exporter import Export
from pipeline.official.groups import ExportSettings
from pipeline.official.importer import Import, ImportSettings
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings
from tests.pipeline.commands.test_cli import call
from tests.pipeline.engine import test_crash_points as crash
from tests.pipeline.helpers.roots import mds_rows, remove_leftovers, run_here, tree
from tests.training.helpers.groups import Encoders, make_encoders, make_source, settings

SIDES = (32, 64)  # pixels
LENGTH, WIDTH = 32, 128  # of tiny-clip


class OfficialDataset(StreamingDataset):
    """Reads a sample as micro_diffusion's datasets/latents_loader.py does."""

    def __init__(self, folder: str, sides: tuple[int, ...], text: tuple[int, int]) -> None:
        super().__init__(local=folder, batch_size=1, shuffle=False)
        self.sides, self.text_shape = sides, text

    def __getitem__(self, index: int) -> dict[str, Any]:  # pyright: ignore
        sample = super().__getitem__(index)
        tokens = np.frombuffer(sample["caption_latents"], dtype=np.float16)
        out: dict[str, Any] = {"caption": sample["caption"]}
        out["caption_latents"] = tokens.copy().reshape(1, *self.text_shape)
        for side in self.sides:
            values = np.frombuffer(sample[f"latents_{side * 8}"], dtype=np.float16)
            out[f"latents_{side * 8}"] = values.copy().reshape(-1, side, side)
        return out


def encode(**changes: Any) -> Encode:
    values: dict[str, Any] = {
        "vae": "tiny4",
        "text_encoder": "tiny-clip",
        "resolutions": SIDES,
        "captions": "alt",
        "text": "full",
    }
    return Encode("openmoji", EncodeSettings(**{**values, **changes}))


def export(store: Store, source: str = "openmoji", **changes: Any) -> Export:
    values = {"vae": "tiny4", "text_encoder": "tiny-clip", "resolutions": SIDES}
    return Export(store, source, ExportSettings(**{**values, **changes}))


def import_(dataset: Path | str, source: str = "theirs", **changes: Any) -> Import:
    values = {"dataset": str(dataset), "vae": "tiny4", "text_encoder": "tiny-clip"}
    return Import(source, ImportSettings(**{**values, **changes}))


@pytest.fixture
def encoded(downloaded: Store) -> Store:
    run_here(encode(), downloaded)
    return downloaded


def write_official(
    folder: Path,
    count: int = 6,
    channels: int = 4,
    sides: tuple[int, ...] = SIDES,
    text: tuple[int, int] = (LENGTH, WIDTH),
    seed: int = 0,
    compression: str | None = None,
    leave_out: str = "",
) -> list[dict[str, Any]]:
    """A dataset as the official precompute step leaves it; captions repeat."""
    rng = np.random.default_rng(seed)
    columns = {"caption": "str", "caption_latents": "bytes"}
    columns |= {f"latents_{side}": "bytes" for side in sides}
    columns.pop(leave_out, None)
    vectors = rng.normal(size=(4, *text)).astype(np.float16)
    rows = []
    with MDSWriter(
        out=str(folder), columns=columns, compression=compression, size_limit=1 << 16
    ) as writer:
        for number in range(count):
            row: dict[str, Any] = {
                "caption": f"caption {number % 4}",
                "caption_latents": vectors[number % 4].tobytes(),
            }
            for side in sides:
                shape = (channels, side // 8, side // 8)
                row[f"latents_{side}"] = rng.normal(size=shape).astype(np.float16).tobytes()
            row.pop(leave_out, None)
            rows.append(row)
            writer.write(row)
    return rows


@pytest.mark.parametrize("latents", ["mean", "sample", "moments"])
def test_the_official_loader_reads_our_groups_after_scaling(downloaded, latents):
    run_here(encode(latents=latents), downloaded)
    stage = export(downloaded, latents=latents)
    assert run_here(stage, downloaded) == 1  # the held-out shard is another export's
    group = "openmoji/official/mds_latents_tiny4_tiny-clip"
    assert stage.groups() == [group]
    (commit,) = read_commits(downloaded, group).values()
    keys = from_parquet(downloaded.read(f"{group}/{commit.file('.parquet')}"))["key"].to_pylist()
    dataset = OfficialDataset(downloaded.url(group), (4, 8), (LENGTH, WIDTH))
    assert len(dataset) == len(keys) == commit.samples == read_manifest(downloaded, group).samples
    vae = read_manifest(downloaded, encode(latents=latents).latents_group(32)).vae  # pyright: ignore
    ours = {
        side: {
            row["key"]: row["latent"]
            for row in mds_rows(downloaded, encode(latents=latents).latents_group(side))
        }
        for side in SIDES
    }
    text = {row["caption"]: row["tokens"] for row in mds_rows(downloaded, encode().text_group())}
    for key, sample in zip(keys, (dataset[i] for i in range(len(dataset))), strict=True):
        np.testing.assert_array_equal(sample["caption_latents"][0], text[sample["caption"]])
        for side in SIDES:
            raw = ours[side][key][:4]  # of moments, the mean
            expected = (raw.astype(np.float32) * vae.scale).astype(np.float16)
            np.testing.assert_array_equal(sample[f"latents_{side}"], expected)
    manifest = read_manifest(downloaded, group)
    assert isinstance(manifest, OfficialManifest)
    assert manifest.latents == ("sample" if latents == "sample" else "mean")
    notes = stage.notes(Catalog(downloaded))
    assert any("the mean is exported" in note for note in notes) == (latents == "moments")


def test_the_papers_sizes_are_what_the_official_code_reshapes_to(tmp_path):
    encoders = Encoders("sdxl", "dfn5b-h14")
    for side in (256, 512):
        make_source(tmp_path, encoders, resolution=side, text="full", samples=2, splits=("train",))
    store = Store(tmp_path)
    values = {"vae": "sdxl", "text_encoder": "dfn5b-h14", "resolutions": (256, 512)}
    stage = export(store, "toy", **values)
    run_here(stage, store)
    index = json.loads(store.read(f"{stage.group}/index.json"))
    (shard,) = index["shards"]
    assert dict(zip(shard["column_names"], shard["column_encodings"], strict=True)) == {
        "caption": "str",
        "caption_latents": "bytes",
        "latents_256": "bytes",
        "latents_512": "bytes",
    }
    sample = OfficialDataset(store.url(stage.group), (32, 64), (77, 1024))[1]
    assert sample["caption_latents"].shape == (1, 77, 1024)
    assert sample["latents_256"].shape == (4, 32, 32)
    assert sample["latents_512"].shape == (4, 64, 64)
    (row, *_) = mds_rows(store, stage.group)
    assert sum(len(value) for name, value in row.items() if name != "caption") == 198_656


def test_export_takes_int8_only_when_told(downloaded):
    run_here(encode(text_dtype="int8"), downloaded)
    with pytest.raises(SettingError, match="int8 is there: --dequantise takes it"):
        export(downloaded)
    stage = export(downloaded, dequantise=True)
    run_here(stage, downloaded)
    rows = mds_rows(downloaded, encode(text_dtype="int8").text_group())
    expected = {row["caption"]: dequantise(row["tokens"], row["scales"]) for row in rows}
    for row in mds_rows(downloaded, stage.group):
        tokens = np.frombuffer(row["caption_latents"], np.float16).reshape(LENGTH, WIDTH)
        np.testing.assert_array_equal(tokens, expected[row["caption"]])


def test_a_rerun_does_nothing_and_new_latents_make_an_export_stale(encoded):
    stage = export(encoded)
    assert run_here(stage, encoded) == 1
    before = tree(Path(encoded.root))
    assert run_here(stage, encoded) == 0
    assert tree(Path(encoded.root)) == before
    drops.add(encoded, "openmoji", {"00000": ["000000001"]})
    run_here(encode(), encoded, Choice(stale=True))
    assert run_here(stage, encoded) == 0
    (why,) = plan(stage, Catalog(encoded)).stale
    assert "latents were made anew" in why
    assert "text was made anew" in why
    assert run_here(stage, encoded, Choice(stale=True)) == 1
    count = json.loads(before[f"{stage.group}/manifest.json"])["samples"]
    assert len(mds_rows(encoded, stage.group)) == count - 1


def test_dropped_and_unmatched_samples_are_left_out_and_counted(tmp_path):
    encoders = make_encoders(tmp_path / "encoders", WIDTH, LENGTH)
    root = tmp_path / "root"
    values: dict[str, Any] = {"text": "full", "samples": 6, "splits": ("train",)}
    make_source(root, encoders, resolution=32, **values)
    make_source(root, encoders, resolution=64, without_caption=("000000003",), **values)
    store = Store(root)
    drops.add(store, "toy", {"00000": ["000000001"]})
    stage = export(store, "toy", vae=encoders.vae, text_encoder=encoders.text)
    run_here(stage, store)
    (commit,) = read_commits(store, stage.group).values()
    assert (commit.samples, commit.rejects) == (4, {"no-text": 1})


def test_shards_that_one_group_lacks_are_told_and_wait(tmp_path):
    encoders = make_encoders(tmp_path / "encoders", WIDTH, LENGTH)
    root = tmp_path / "root"
    values: dict[str, Any] = {"text": "full", "samples": 2}
    make_source(root, encoders, resolution=64, splits=("train", "train"), **values)
    make_source(root, encoders, resolution=32, splits=("train",), **values)
    store = Store(root)
    stage = export(store, "toy", vae=encoders.vae, text_encoder=encoders.text)
    (note,) = stage.notes(Catalog(store))
    assert "1 of 2 shards are not in toy/latents" in note
    assert "first: 00001" in note
    assert run_here(stage, store) == 1
    make_source(root, encoders, resolution=32, splits=("train", "train"), **values)
    assert run_here(stage, store) == 1


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_round_trip_gives_every_column_byte_for_byte(tmp_path, compression, parts):
    folder = tmp_path / "official"
    rows = []
    for part in range(parts):
        where = folder / str(part) if parts > 1 else folder
        rows += write_official(where, 30, seed=part, compression=compression)
    if parts > 1:
        merge_index(str(folder), keep_local=True)  # as the official code does
    store = Store(tmp_path / "root")
    stage = import_(folder)
    shards = run_here(stage, store)
    assert shards > parts  # the writer cut each part into several
    assert run_here(stage, store) == 0
    out = export(store, "theirs", latents="sample")
    assert run_here(out, store) == shards
    assert mds_rows(store, out.group) == rows
    manifest = read_manifest(store, stage.latents_group(32))
    assert (manifest.latents, manifest.source) == ("sample", "theirs")  # pyright: ignore
    assert stage.latents_group(32) == "theirs/latents/tiny4/32.sample"
    (commit, *_) = read_commits(store, stage.text_group()).values()
    assert commit.counters["distinct_captions"] == 4
    assert commit.counters["further_vectors_of_a_caption"] == 0
    assert verify(store, select(store, None, None), workers=1).problems == 0


def test_a_group_that_was_imported_streams_to_training(tmp_path):
    from training.config.load import resolve
    from training.data.loader import make_dataset, make_loader
    from training.run.preflight import check

    encoders = make_encoders(tmp_path / "encoders")
    rows = write_official(tmp_path / "official", 8, sides=(64,), text=(12, 16))
    root = tmp_path / "root"
    stage = import_(tmp_path / "official", "cc12m", vae=encoders.vae, text_encoder=encoders.text)
    run_here(stage, Store(root))
    raw = settings(root, encoders, tmp_path / "run")  # batches of 8
    raw["data"] |= {"sources": ["cc12m"], "text": "full", "latents": "sample"}
    dataset = make_dataset(check(resolve(raw)), "masked", shuffle=False)
    (batch,) = make_loader(dataset, workers=0, trimmed=False)
    for row, latent, y in zip(rows, batch["latents"].numpy(), batch["y"].numpy(), strict=True):
        assert y.tobytes() == row["caption_latents"]
        expected = np.frombuffer(row["latents_64"], np.float16).reshape(4, 8, 8)
        vae = vae_facts(encoders.vae)
        assert vae.shift  # which is ours alone
        assert ulps(latent + vae.shift * vae.scale, expected).max() <= 1
    assert [dataset[i]["caption"] for i in range(8)] == [row["caption"] for row in rows]


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance in units in the last place, of values away from zero; else of its neighbourhood."""
    spacing = np.spacing(np.maximum(np.abs(b), np.float16(0.25))).astype(np.float64)
    return np.abs(a.astype(np.float64) - b.astype(np.float64)) / spacing


SHIFTED = VaeFacts(name="x", repo="x", channels=4, downsample=8, scale=1.5305, shift=0.0609)


@pytest.mark.parametrize("vae", [*map(vae_facts, VAES), SHIFTED], ids=lambda vae: vae.name)
def test_every_finite_official_value_comes_back_to_the_bit(vae):
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    values = bits[np.isfinite(bits) & (np.abs(bits.astype(np.float32)) < 100)]
    raw, correction = official.from_official(values, vae)
    assert np.isfinite(raw).all()
    back = official.to_official(raw, vae, correction)
    np.testing.assert_array_equal(back.view(np.uint16), values.view(np.uint16))
    # What training sees, without the correction: fp16's own rounding of the raw latent.
    plain = official.to_official(raw, vae)
    distance = plain.view(np.int16).astype(int) - values.view(np.int16)
    distance[(plain == 0) & (values == 0)] = 0  # -0 comes back as 0
    assert np.abs(distance).max() <= 1


@pytest.mark.parametrize("shift", [0.0, 0.0609, -3.0])
def test_the_official_code_scales_and_never_shifts(shift):
    """Its encoder stores z · scale, its sampler decodes latent / scale (micro_diffusion)."""
    vae = SHIFTED.model_copy(update={"shift": shift, "scale": 0.5})
    raw = np.array([-2.5, 0.0, 0.25, 7.0], np.float16)
    np.testing.assert_array_equal(official.to_official(raw, vae), raw / 2)
    back, correction = official.from_official(raw / 2, vae)
    np.testing.assert_array_equal(back, raw)
    assert correction == b""


def test_exports_that_were_shifted_are_stale_and_others_are_not(encoded):
    stage = export(encoded)  # tiny4 has a shift
    run_here(stage, encoded)
    path = f"{stage.group}/commits/00000.json"
    record = encoded.read_json(path)
    inputs = {name: v for name, v in record["inputs"].items() if name != "official_form"}
    assert inputs != record["inputs"]
    encoded.write_json(path, {**record, "inputs": inputs, "fingerprint": fingerprint(inputs)})
    assert facts.clashes(facts.of(stage.group, record["inputs"]), facts.of(stage.group, inputs))
    (found,) = plan(export(encoded), Catalog(encoded)).groups.values()
    assert list(found.stale) == [
        "an earlier release applied the VAE's shift, which the official code lacks"
    ]
    assert official.form(vae_facts("sdxl")) == {}


def test_an_import_that_was_shifted_is_not_exported(tmp_path):
    write_official(tmp_path / "official", 2)
    store = Store(tmp_path / "root")
    stage = import_(tmp_path / "official")
    run_here(stage, store)
    for number in SIDES:
        path = f"{stage.latents_group(number)}/commits/00000.json"
        record = store.read_json(path)
        del record["inputs"]["official_form"]
        store.write_json(path, record)
    with pytest.raises(BrokenShard, match=r"earlier release.* `pipeline convert import --stale"):
        run_here(export(store, "theirs", latents="sample"), store)


def test_corrections_of_sdxl_cost_a_thirtieth():
    values = np.random.default_rng(0).normal(size=4096).astype(np.float16)
    raw, correction = official.from_official(values, vae_facts("sdxl"))
    missed = official.to_official(raw, vae_facts("sdxl")) != values
    assert 0.02 < missed.mean() < 0.06
    import zlib

    assert len(zlib.compress(correction)) < 0.05 * values.nbytes


def test_a_caption_with_several_vectors_keeps_them(tmp_path):
    folder = tmp_path / "official"
    rows = write_official(folder, 3, seed=1)
    rows += [{**rows[0], "caption_latents": rows[1]["caption_latents"]}, rows[0]]
    shutil.rmtree(folder)
    columns = official.columns(list(SIDES))
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for row in rows:
            writer.write(row)
    store = Store(tmp_path / "root")
    stage = import_(folder)
    run_here(stage, store)
    (commit,) = read_commits(store, stage.text_group()).values()
    assert commit.counters["distinct_captions"] == 3
    assert commit.counters["further_vectors_of_a_caption"] == 1
    out = export(store, "theirs", latents="sample")
    run_here(out, store)
    assert mds_rows(store, out.group) == rows
    assert verify(store, select(store, None, None), workers=1).problems == 0


def test_bad_samples_are_rejects_and_other_columns_do_not_matter(tmp_path):
    folder = tmp_path / "official"
    rows = write_official(folder, 6)
    shutil.rmtree(folder)
    rows[1]["latents_32"] = rows[1]["latents_32"][:-2]
    rows[2]["caption_latents"] = np.full(LENGTH * WIDTH, np.nan, np.float16).tobytes()
    columns = {**official.columns(list(SIDES)), "jpg": "jpeg"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for row in rows:
            writer.write({**row, "jpg": b"\xff\xd8 not one of ours"})
    store = Store(tmp_path / "root")
    stage = import_(folder)
    run_here(stage, store)
    found = {g: read_commits(store, g)["00000"] for g in stage.groups()}
    assert {g: (c.samples, c.rejects) for g, c in found.items()} == {
        stage.latents_group(32): (4, {"non-finite": 1, "wrong-size": 1}),
        stage.latents_group(64): (5, {"non-finite": 1}),
        stage.text_group(): (5, {"non-finite": 1}),
    }


@pytest.mark.parametrize("moment", ["before", "torn", "after"])
@pytest.mark.parametrize("name", ["export", "import"])
def test_a_crash_at_any_write_and_a_rerun_give_the_same_tree(tmp_path, name, moment):
    encoders = make_encoders(tmp_path / "encoders", WIDTH, LENGTH)
    begin = tmp_path / "begin"
    begin.mkdir()
    if name == "export":
        make_source(begin, encoders, samples=2, text="full", splits=("train", "train"))
    else:
        write_official(tmp_path / "official", 10)  # two shards

    def stage(store: Store):
        if name == "import":
            return import_(tmp_path / "official")
        names = {"vae": encoders.vae, "text_encoder": encoders.text}
        return export(store, "toy", resolutions=(64,), **names)

    def run(root: Path) -> None:
        run_here(stage(Store(root)), Store(root))

    whole = tmp_path / "whole"
    shutil.copytree(begin, whole)
    writes = crash._counted(lambda: run(whole))
    expected = tree(whole)
    assert writes >= 6
    for number in range(writes):
        root = tmp_path / f"{number}"
        shutil.copytree(begin, root)
        crash._die_at(number, moment, lambda root=root: run(root))
        for group in stage(Store(root)).groups():
            remove_leftovers(Store(root), group)
        run(root)
        assert tree(root) == expected, f"write {number}"


def test_status_verify_and_prune_know_an_export(encoded):
    stage = export(encoded)
    run_here(stage, encoded)
    name = stage.group.removeprefix("openmoji/")
    assert name in groups_of(encoded, "openmoji")
    (row,) = (row for row in collect(encoded.root) if row.group == name)
    assert (row.stage, row.done, row.stale) == ("export", 1, {})
    assert find(encoded, "openmoji") == []
    chosen = select(encoded, None, name)
    assert verify(encoded, chosen, workers=1).problems == 0
    (commit,) = read_commits(encoded, stage.group).values()
    path = Path(encoded.url(f"{stage.group}/{commit.file('.mds')}"))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    problems: list[Any] = []
    verify(encoded, chosen, workers=1, found=problems.append)
    assert "sha256 differs" in problems[0].what


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ({"leave_out": "caption"}, r"column caption \(str\) is missing in shard.00000.mds"),
        ({"leave_out": "caption_latents"}, r"column caption_latents \(bytes\) is missing"),
        ({"sides": ()}, r"column latents_256 \(bytes\) is missing"),
        ({"channels": 16}, "512 bytes a sample, 16 channels; tiny4 has 4 channels of 4x4"),
        ({"text": (77, 64)}, "9856 bytes a sample; tiny-clip gives 32 tokens of width 128"),
    ],
)
def test_a_dataset_that_does_not_fit_is_one_line(tmp_path, make, message):
    write_official(tmp_path / "official", **make)
    with pytest.raises(SettingError, match=message) as error:
        run_here(import_(tmp_path / "official"), Store(tmp_path / "root"))
    assert "\n" not in str(error.value)


def test_a_dataset_whose_files_are_not_there_or_are_others(tmp_path):
    folder = tmp_path / "official"
    write_official(folder)
    shard = folder / "shard.00000.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    store = Store(tmp_path / "root")
    with pytest.raises(BrokenShard, match=rf"{len(whole) - 3} bytes, its index says {len(whole)}"):
        run_here(import_(folder), store)
    shard.unlink()
    with pytest.raises(BrokenShard, match=r"shard.00000.mds is missing"):
        run_here(import_(folder), store)
    assert tree(tmp_path / "root") == {} if (tmp_path / "root").exists() else True


@pytest.mark.parametrize("index", [None, "[]", "{", '{"version": 2, "shards": []}'])
def test_a_folder_that_is_no_mds_dataset_is_one_line(tmp_path, index):
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    with pytest.raises(SettingError, match=r"index.json") as error:
        import_(tmp_path)
    assert "\n" not in str(error.value)


def test_groups_that_cannot_be_exported_name_the_command(downloaded):
    run_here(encode(text="trimmed", resolutions=(32,), latents="sample"), downloaded)
    with pytest.raises(SettingError, match=r"there: 32\.sample; --latents and --crop choose"):
        export(downloaded, resolutions=(32,))
    with pytest.raises(
        SettingError, match=r"trimmed is there, and its padded rows .* encode .*--text full"
    ):
        export(downloaded, resolutions=(32,), latents="sample")


def test_an_export_does_not_mix_with_another_of_its_name(encoded):
    run_here(export(encoded, name="mine"), encoded)
    with pytest.raises(SettingError, match=r"is another export \(resolutions: expected"):
        export(encoded, name="mine", resolutions=(32,))
    with pytest.raises(SettingError, match="holds split train; choose another --out"):
        list(export(encoded, name="mine", split="heldout").plan(Catalog(encoded)))
    heldout = export(encoded, split="heldout")
    assert heldout.group == "openmoji/official/mds_latents_tiny4_tiny-clip_heldout"
    assert run_here(heldout, encoded) == 1
    with pytest.raises(SettingError, match="give a name"):
        export(encoded, name="/elsewhere")
    with pytest.raises(SettingError, match=r"no shard of it \(there: heldout, train\)"):
        export(encoded, split="val").notes(Catalog(encoded))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export"], "--source"),
        (["export", "--source", "../x"], "one folder below the root"),
        (["export", "--source", "theirs", "--resolutions", "a"], "resolutions"),
        (["export", "--source", "theirs"], "pipeline run encode"),
        (["import", "--source", "theirs"], "--from is missing"),
        (["import", "--source", "theirs", "--from", "."], "--vae is missing"),
        (
            ["import", "--source", "x", "--from", ".", "--vae", "sdx", "--text-encoder", "t"],
            'mean "sdxl"',
        ),
    ],
)
def test_bad_options_are_one_line_and_exit_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setenv("MICRODIT_ROOT", str(tmp_path / "root"))
    code, out, err = call(monkeypatch, capsys, "convert", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.slow
def test_the_commands_run_on_ray(encoded, tmp_path, monkeypatch, capsys):
    where = ["--root", encoded.root, "--workers", "2"]
    names = ["--vae", "tiny4", "--text-encoder", "tiny-clip", "--resolutions", "32,64"]
    ours = ["convert", "export", "--source", "openmoji", "--captions", "alt", *names, *where]
    code, out, _ = call(monkeypatch, capsys, *ours, "--dry-run")
    assert (code, "1 shards left" in out) == (0, True)
    code, out, _ = call(monkeypatch, capsys, *ours)
    folder = f"{encoded.root}/openmoji/official/mds_latents_tiny4_tiny-clip"
    assert (code, folder in out) == (0, True)
    theirs = ["convert", "import", "--from", folder, "--source", "theirs", *names, *where]
    code, out, _ = call(monkeypatch, capsys, *theirs)
    assert code == 0
    group = layout.latents_group("theirs", "tiny4", 64, "sample")
    assert len(mds_rows(encoded, group)) == len(mds_rows(encoded, folder[len(encoded.root) + 1 :]))
    code, out, _ = call(monkeypatch, capsys, "verify", "--root", encoded.root)
    assert (code, " 0 problems" in out) == (0, True)

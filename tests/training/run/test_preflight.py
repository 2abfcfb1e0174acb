"""Settings against each other and against the shards: what a run is refused for, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import SettingError
from pipeline.core.store import Store
from tests.training.helpers.groups import Encoders, changed, make_source
from training.config.load import resolve
from training.config.plan import MissingData
from training.run.preflight import check


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.vae": "sdxll"}, 'vae=sdxll: unknown; did you mean "sdxl"?'),
        ({"data.text_encoder": "dfn5b"}, 'text_encoder=dfn5b: unknown; did you mean "dfn5b-h14"?'),
        ({"stages.full.resolution": 72}, "stages.full.resolution=72: must be a multiple of 16"),
        (
            {"stages.masked.mask_ratio": {"from": 0.1, "to": 0.95, "steps": 10}},
            "stages.masked: mask_ratio 0.95: keeps none of 16 patches; at most 0.9375",
        ),
        (
            {"stages.masked.mask": "block", "stages.masked.mask_block": 8},
            "stages.masked: mask_block 8: does not divide the 4 x 4 patches of an image",
        ),
        (
            {"stages.masked.mask": "tread", "stages.masked.tread_blocks": [1, 2]},
            "stages.masked: tread_blocks [1, 2]: the backbone's last block is 1",
        ),
        ({"stages.masked.mask": "maskdit"}, "stages.masked: mask maskdit without a decoder: set"),
        ({"model.width": 40}, "model: width 40: choose a multiple of head_dim 16"),
        ({"stages.masked.mask_ratio": 0.99}, "stages.masked: mask_ratio 0.99: keeps none of 16"),
    ],
)
def test_settings_that_do_not_fit(
    raw: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    for key, value in changes.items():
        raw = changed(raw, key, value)
    with pytest.raises(SettingError) as error:
        check(resolve(raw))
    assert message in str(error.value)


def test_ranks_share_the_batch(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingError, match=r"stages.masked.batch_size=8: .* 3 ranks"):
        check(resolve(raw))


def test_no_shards_names_the_command(raw: dict[str, Any]) -> None:
    with pytest.raises(MissingData) as error:
        check(resolve(raw))
    message, data = str(error.value), raw["data"]
    assert "no shards at" in message
    assert f"`pipeline run encode --source toy --root {data['root']} --vae {data['vae']}" in message
    assert "--resolutions 64 --captions alt --text trimmed`" in message


def edit(store: Store, path: str, change: dict[str, Any]) -> None:
    store.write_json(path, store.read_json(path) | change)


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("latents", {"resolution": 128}, "resolution: expected 64, found 128"),
        ("text", {"text": "full"}, "text: expected trimmed, found full"),
        ("text", {"captions": "llava"}, "captions: expected alt, found llava"),
    ],
)
def test_shards_made_otherwise_are_refused(
    raw: dict[str, Any], encoders: Encoders, group: str, change: dict[str, Any], message: str
) -> None:
    store = make_source(Path(raw["data"]["root"]), encoders)
    path = next(Path(store.root).glob(f"toy/{group}/**/manifest.json")).relative_to(store.root)
    edit(store, str(path), change)
    with pytest.raises(SettingError) as error:
        check(resolve(raw))
    assert message in str(error.value)
    assert "--stale" in str(error.value)


def test_a_vae_that_changed_is_refused(raw: dict[str, Any], encoders: Encoders) -> None:
    store = make_source(Path(raw["data"]["root"]), encoders)
    path = next(Path(store.root).glob("toy/latents/**/manifest.json")).relative_to(store.root)
    facts = store.read_json(str(path))["vae"]
    edit(store, str(path), {"vae": facts | {"scale": 0.13}})
    with pytest.raises(SettingError, match=r"vae scale: expected 0.5, found 0.13"):
        check(resolve(raw))


def test_sources_of_different_weights_are_refused(raw: dict[str, Any], encoders: Encoders) -> None:
    root = Path(raw["data"]["root"])
    for name, found in {"toy": "cd", "other": "ab"}.items():
        of_weights(make_source(root, encoders, name=name), name, found)
    with pytest.raises(SettingError, match="toy and other were encoded by different vaes"):
        check(resolve(changed(raw, "data.sources", ["toy", "other"])))


def of_weights(store: Store, name: str, sha256: str) -> None:
    path = next(Path(store.root).glob(f"{name}/latents/**/manifest.json")).relative_to(store.root)
    edit(store, str(path), {"vae": store.read_json(str(path))["vae"] | {"weights_sha256": sha256}})


def test_weights_of_imported_groups_are_unknown(raw: dict[str, Any], encoders: Encoders) -> None:
    """`pipeline convert import` cannot tell what made the latents; others must still agree."""
    root = Path(raw["data"]["root"])
    for name, found in {"imported": "", "toy": "ab", "other": "ab"}.items():
        of_weights(make_source(root, encoders, name=name), name, found)
    sources = changed(raw, "data.sources", ["imported", "toy", "other"])
    assert len(check(resolve(sources)).data["full"]) == 3
    of_weights(Store(root), "other", "cd")
    with pytest.raises(SettingError, match="toy and other were encoded by different vaes"):
        check(resolve(sources))


def test_sources_with_captions_of_their_own(raw: dict[str, Any], encoders: Encoders) -> None:
    root = Path(raw["data"]["root"])
    make_source(root, encoders)
    make_source(root, encoders, name="other", captions="llava-1.5-7b.medium")
    raw = changed(raw, "data.sources", ["toy", "other"])
    with pytest.raises(MissingData, match=r"--source other .* --captions alt "):
        check(resolve(raw))
    raw = changed(raw, "data.captions", {"other": "llava-1.5-7b.medium"})
    plan = check(resolve(raw))
    groups = [source.text_group for source in plan.data["masked"]]
    assert [group.rsplit("/", 1)[1] for group in groups] == [
        "alt.trimmed",
        "llava-1.5-7b.medium.trimmed",
    ]
    assert plan.config.data.all_captions() == "alt; other: llava-1.5-7b.medium"
    with pytest.raises(SettingError, match=r'data.captions.othr: no source .* "other"'):
        resolve(changed(raw, "data.captions", {"othr": "colour"}))


def test_files_that_are_gone(raw: dict[str, Any], encoders: Encoders) -> None:
    store = make_source(Path(raw["data"]["root"]), encoders)
    next(Path(store.root).glob("toy/latents/**/00001-*.mds")).unlink()
    with pytest.raises(MissingData, match="1 of 2 shard files are missing"):
        check(resolve(raw))


def test_shards_without_captions(raw: dict[str, Any], encoders: Encoders) -> None:
    store = make_source(Path(raw["data"]["root"]), encoders)
    path = str(next(Path(store.root).glob("toy/text/**/index.json")).relative_to(store.root))
    index = store.read_json(path)
    edit(store, path, {"shards": index["shards"][1:], "inputs": index["inputs"][1:]})
    with pytest.raises(MissingData, match=r"1 of 2 shards have latents but no captions.*00000"):
        check(resolve(raw))


def test_too_few_samples(raw: dict[str, Any], encoders: Encoders) -> None:
    make_source(Path(raw["data"]["root"]), encoders, samples=3)
    with pytest.raises(SettingError, match=r"batch_size=8: the train split has only 6 samples"):
        check(resolve(raw))


def test_no_shard_of_the_split(raw: dict[str, Any], encoders: Encoders) -> None:
    make_source(Path(raw["data"]["root"]), encoders)
    with pytest.raises(MissingData, match=r"no shard of split val .*heldout, train"):
        check(resolve(changed(raw, "data.split", "val")))


def test_kinds_of_latents_have_groups_of_their_own(raw: dict[str, Any], encoders: Encoders) -> None:
    root = Path(raw["data"]["root"])
    make_source(root, encoders)
    wanted = changed(changed(raw, "data.latents", "moments"), "data.crop", "random")
    with pytest.raises(MissingData) as error:
        check(resolve(wanted))
    assert "--latents moments --crop random" in str(error.value)
    store = make_source(root, encoders, latents="moments", crop="random")
    assert check(resolve(wanted)).data["full"][0].latents.latents == "moments"
    path = next(root.glob("toy/latents/**/64.moments.random/manifest.json")).relative_to(root)
    edit(store, str(path), {"latents": "sample"})
    with pytest.raises(SettingError, match="latents: expected moments, found sample"):
        check(resolve(wanted))

"""What a group's shards have in common: its manifest says that, and no command can change it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipeline.commands.checks import Problem
from pipeline.commands.status import collect
from pipeline.commands.verify import repair, select, verify
from pipeline.core import facts, layout, mix
from pipeline.core.catalog import Catalog
from pipeline.core.commits import read_commits
from pipeline.core.errors import SettingError
from pipeline.core.groups import publish
from pipeline.core.manifest import LatentsManifest, TextManifest, read_manifest
from pipeline.core.store import Store, fingerprint
from pipeline.encoders import find_text, find_vae
from pipeline.engine.plan import Choice, plan, preflight
from pipeline.stages.caption import CaptionStage
from pipeline.stages.download import Download
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings
from tests.pipeline.helpers.roots import SETTINGS, run_here, tree
from tests.pipeline.official.test_convert import encode as encode_two
from tests.pipeline.official.test_convert import export

FIRST, BOTH = Choice("00000"), Choice()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two shards of pictures, the first of them encoded by a VAE of the user's own."""
    folder = tmp_path_factory.mktemp("facts")
    shutil.copytree(find_vae("tiny4")[1], folder / "vae")
    shutil.copytree(find_text("tiny-clip")[1], folder / "text")
    store = Store(folder / "root")
    run_here(Download("openmoji", SETTINGS), store)
    run_here(CaptionStage("openmoji", "colour"), store)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_here(stage(), store, FIRST)
    return folder


@pytest.fixture
def store(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Store(tmp_path / "root")


def stage(**changes: Any) -> Encode:
    values: dict[str, Any] = {"vae": "vae", "text_encoder": "text", "resolutions": (64,)}
    values |= {"captions": "alt:3,colour:1", "text": "trimmed"}
    return Encode("openmoji", EncodeSettings(**{**values, **changes}))


LATENTS, TEXT = "openmoji/latents/vae/64", "openmoji/text/text/alt-3+colour-1.trimmed"


def refusal(store: Store, made: Any, choice: Choice = BOTH) -> str:
    """What `pipeline run` says before it makes anything; "" where it would begin."""
    try:
        preflight(made, store, plan(made, Catalog(store), choice))
    except SettingError as error:
        return str(error)
    return ""


def problems(store: Store) -> list[Problem]:
    found: list[Problem] = []
    verify(store, select(store, None, None), 1, found.append)
    return found


def rescale(scale: float = 0.5) -> None:
    path = Path("vae/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": scale}))


def retrain(folder: str) -> None:
    (path,) = Path(folder).glob("*.safetensors")
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, path, {"format": "pt"})


def test_a_vae_that_was_replaced_changes_no_manifest_and_joins_no_group(store: Store) -> None:
    before = tree(Path(store.root))
    assert refusal(store, stage()) == ""  # the second shard, by the same encoders
    rescale()
    retrain("vae")
    run_here(stage(), store, FIRST)  # nothing to make
    assert tree(Path(store.root)) == before
    line = refusal(store, stage())
    assert "/latents/vae/64: 1 of its shards were made by or with others (" in line
    assert "vae.scale: 0.56744 -> 0.5; vae weights hash differs" in line
    assert "--stale" in line
    assert "--root" in line
    assert refusal(store, stage(), FIRST) == ""  # nothing to make: told as stale
    assert refusal(store, stage(), Choice("00001", stale=True)) == line
    assert refusal(store, stage(), Choice(stale=True)) == ""
    run_here(stage(), store, Choice(stale=True))
    manifest = read_manifest(store, LATENTS)
    assert isinstance(manifest, LatentsManifest)
    assert (manifest.vae.scale, manifest.shards) == (0.5, 2)
    assert problems(store) == []
    Path("vae").rename("other")  # or a name of its own
    assert refusal(store, stage(vae="other")) == ""


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"small": "upscale"}, "small: reject -> upscale"),
        ({"dtype": "bfloat16"}, "vae.dtype: float32 -> bfloat16"),
        ({"text_encoder": "text"}, "text_encoder weights hash differs"),
    ],
)
def test_whatever_a_manifest_says_holds_for_all_shards(
    store: Store, changes: dict[str, Any], what: str
) -> None:
    if "text_encoder" in changes:
        retrain("text")
    assert what in refusal(store, stage(**changes))


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"seed": 1}, {"compression": "zstd"}])
def test_other_settings_may_differ_between_shards(store: Store, changes: dict[str, Any]) -> None:
    assert refusal(store, stage(**changes)) == ""
    run_here(stage(**changes), store)
    assert read_manifest(store, LATENTS).shards == 2


def test_the_same_weights_from_another_place_are_the_same(store: Store) -> None:
    """As a hub repo's are whose README has changed: another revision."""
    one = stage()
    one.vae = one.vae.model_copy(update={"revision": "ab" * 20})
    assert refusal(store, one) == ""
    run_here(one, store)
    manifest = read_manifest(store, LATENTS)
    assert isinstance(manifest, LatentsManifest)
    assert (manifest.vae.revision, manifest.vae.scale, manifest.shards) == ("", 0.56744, 2)


def test_a_group_in_two_types_of_an_earlier_release_goes_on(store: Store) -> None:
    run_here(stage(dtype="bfloat16"), store)
    manifest = read_manifest(store, LATENTS)
    assert isinstance(manifest, LatentsManifest)
    assert (manifest.vae.dtype, manifest.shards) == ("", 2)
    assert problems(store) == []
    Path(store.url(f"{TEXT}/commits/00001.json")).unlink()
    shutil.copy(f"{store.root}/{LATENTS}/commits/00001.json", "kept.json")
    for dtype in ("float32", "bfloat16"):
        assert refusal(store, stage(dtype=dtype)) == ""


def test_a_redo_that_was_stopped_keeps_the_generation_before(store: Store) -> None:
    run_here(stage(), store)
    published = [store.read(f"{LATENTS}/{name}") for name in ("index.json", "manifest.json")]
    rescale()
    run_here(stage(), store, Choice("00001", stale=True))  # and then it was killed
    assert [store.read(f"{LATENTS}/{n}") for n in ("index.json", "manifest.json")] == published
    assert "vae.scale: 0.56744 -> 0.5" in publish(store, LATENTS) + publish(store, LATENTS)
    (problem,) = problems(store)
    assert problem.shard == ""
    assert "1 of its shards were made by or with others than 1 (vae.scale: 0.5" in str(problem)
    assert "--vae vae --resolutions 64` --stale makes all of them anew" in str(problem)
    (line,) = repair(store, [problem])
    assert "its index and manifest stay as they are" in line
    assert set(read_commits(store, LATENTS)) == {"00000", "00001"}
    run_here(stage(), store, Choice(stale=True))
    assert problems(store) == []


def test_no_manifest_stands_beside_the_index_of_others(store: Store, monkeypatch) -> None:
    """A run that dies between the two writes of `publish`."""
    rescale()
    write = Store.write

    def die(self: Store, path: str, data: bytes) -> None:
        if path.endswith("index.json"):
            raise KeyboardInterrupt
        write(self, path, data)

    monkeypatch.setattr(Store, "write", die)
    with pytest.raises(KeyboardInterrupt):
        run_here(stage(), store, Choice("00000", stale=True))
    monkeypatch.undo()
    assert not store.exists(f"{LATENTS}/index.json")


def test_verify_compares_every_commit_with_the_manifest(store: Store) -> None:
    """A manifest as an earlier release left it: of the last command, not of the shards."""
    run_here(stage(), store)
    good = tree(Path(store.root))
    record = store.read_json(f"{LATENTS}/manifest.json")
    record["vae"] |= {"scale": 0.5, "weights_sha256": "00"}
    store.write_json(f"{LATENTS}/manifest.json", record)
    record = store.read_json(f"{TEXT}/manifest.json")
    store.write_json(f"{TEXT}/manifest.json", record | {"captions": "colour"})
    found = problems(store)
    assert [problem.group for problem in found] == [
        LATENTS.removeprefix("openmoji/"),
        TEXT.removeprefix("openmoji/"),
    ]
    assert "manifest.json does not describe its shards (vae.scale: 0.5 -> 0.56" in str(found[0])
    assert "captions: colour -> alt:0.75,colour:0.25" in str(found[1])
    repair(store, found)
    assert tree(Path(store.root)) == good


def test_captions_of_two_models_do_not_share_a_group(store: Store) -> None:
    colour = CaptionStage("openmoji", "colour")
    path = "openmoji/captions/colour/commits/00000.json"
    Path(store.url(path.replace("00000", "00001"))).unlink()
    record = store.read_json(path)
    inputs = {**record["inputs"], "revision": "another"}
    store.write_json(path, {**record, "inputs": inputs, "fingerprint": fingerprint(inputs)})
    assert "captions/colour: 1 of its shards were made by" in refusal(store, colour)
    assert refusal(store, colour, Choice(stale=True)) == ""


def test_names_that_share_a_folder_are_told_apart_by_its_commits(store: Store) -> None:
    """As "VAE" and "vae" do where a file system takes them for one."""
    shutil.copytree("vae", "VAE")
    Path(store.url("openmoji/latents/VAE")).symlink_to("vae")
    line = refusal(store, stage(vae="VAE"))
    assert "vae.name: vae -> VAE" in line


def test_an_export_is_not_made_of_a_group_that_is_half_redone(store: Store) -> None:
    changes = {"vae": "vae", "text_encoder": "text"}
    run_here(encode_two(**changes), store)
    exported = export(store, **changes)
    run_here(exported, store)
    rescale()
    run_here(encode_two(**changes), store, Choice("00000", stale=True))
    with pytest.raises(SettingError, match=r"does not describe all of its shards \(vae.scale"):
        plan(export(store, **changes), Catalog(store))
    assert collect(store.root)


def test_the_facts_of_imports_and_exports_are_those_of_their_manifests(store: Store) -> None:
    from tests.pipeline.official.test_convert import import_

    changes = {"vae": "vae", "text_encoder": "text", "latents": "moments"}
    run_here(encode_two(**changes), store)
    exported = export(store, **changes)
    run_here(exported, store)
    imported = import_(store.url(exported.group), vae="vae", text_encoder="text")
    run_here(imported, store)
    assert read_manifest(store, exported.group).model_dump(exclude={"vae", "text_encoder"}) == {
        **{"schema_version": 1, "kind": "official", "source": "openmoji", "crop": "center"},
        **{"latents": "mean", "captions": "alt", "dtype": "float16", "resolutions": [32, 64]},
        **{"samples": 5, "splits": {"train": 5}, "shards": 1},
    }
    for group in imported.groups():
        manifest = read_manifest(store, group)
        assert manifest.shards == 1
        if isinstance(manifest, TextManifest):
            assert (manifest.text, manifest.captions, manifest.dtype) == ("full", "alt", "float16")
    assert problems(store) == []


def test_a_crowd_of_commits_has_few_facts() -> None:
    inputs = {"vae": {"name": "x"}, "resolution": 64, "latents": "mean"}
    found = [facts.of("s/latents/x/64", {**inputs, "images": str(n)}) for n in range(100)]
    assert len({id(text) for text in found}) == 1
    assert facts.of("s/latents/x/64", {"stage": "of someone else"}) == ""
    assert Counter(found).total() == 100


NAMES = [
    *(
        "tiny4",
        "Tiny4",
        "модель",
        "Модель",
        "другая",
        "模型",
        "模型2",
        "my vae",
        "my#vae",
        "my~vae",
    ),
    *("ё", "е", "\u00e9", "e\u0301", "owner/name", "owner/имя", ".", "..", "/", "a b", "a  b"),
]


def test_names_are_kept_apart_whatever_their_letters() -> None:
    for one, other in itertools.combinations(NAMES, 2):
        assert layout.slug(one) != layout.slug(other), (one, other)
    for name in NAMES:
        assert layout.slug(name).strip(".")
        assert layout.slug(name).isascii()
        assert "/" not in layout.slug(name)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("tiny-clip", "tiny-clip"),
        ("stabilityai/SD_vae.v1", "stabilityai--SD_vae.v1"),
        ("me/x@v1", "me--x--v1"),
        ("/home/me/vae/", "home--me--vae"),
        ("alt:0.9,colour:0.1", "alt-0.9+colour-0.1"),
        ("llava-1.5-7b.short.n3.t0.7", "llava-1.5-7b.short.n3.t0.7"),
    ],
)
def test_plain_names_keep_the_folders_that_they_have(name: str, folder: str) -> None:
    assert layout.slug(name) == folder


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("alt:9,colour:1", "alt:0.9,colour:0.1", True),
        ("a:1,b:1,c:1", "c:0.3333333,b:0.3333333,a:0.3333333", True),
        ("alt", "alt:3", True),
        ("alt:0.9,colour:0.1", "alt:0.8,colour:0.2", False),
        ("alt", "colour", False),
        ("a,a", "a,a", True),
        ("a,a", "a", False),
    ],
)
def test_mixes_are_the_same_however_they_are_written(one: str, other: str, same: bool) -> None:
    assert mix.same(one, other) is same

"""Scores of a model, over roots of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.store import Store
from pipeline.sources.folder import Folder
from pipeline.stages.download import Download
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings
from tests.pipeline.helpers.roots import run_here
from tests.pipeline.helpers.upstream import picture
from tests.training.test_generate import run_folder
from training.scores import CANDIDATES, main, read_examples
from training.weights import weights_file

PICTURES = CANDIDATES + 4
LATENTS = "folder/latents/tiny4/64"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A remote root with pictures that are not square, of different sizes, encoded at 64 px."""
    photos = tmp_path_factory.mktemp("photos")
    for n in range(PICTURES):
        width, height = (290 + n, 272) if n % 2 else (270, 290 + n)
        (photos / f"{n:03d}.jpg").write_bytes(picture(n, width, height))
        (photos / f"{n:03d}.txt").write_text(f"photo number {n}")
    store = Store(f"memory://{photos.name}-{id(photos)}")
    source = Folder(folder=str(photos))
    settings = EncodeSettings("tiny4", "tiny-clip", (64,), "alt", "trimmed", compression="zstd")
    for stage in (Download("folder", source), Encode("folder", settings)):
        run_here(stage, store)
    return store.root


@pytest.fixture(scope="module")
def checkpoint(root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = run_folder(tmp_path_factory.mktemp("scores") / "run", "trimmed") / "model.safetensors"
    tensors, metadata = weights_file.read(path)
    data = {"root": root, "sources": ["folder"], "split": "train"}
    weights_file.write(path, tensors, metadata.model_copy(update={"config": {"data": data}}))
    return path


def refused(capsys: pytest.CaptureFixture, code: int, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_pictures_that_are_not_square_in_a_remote_root(checkpoint: Path, tmp_path: Path) -> None:
    (examples,) = read_examples(weights_file.read_metadata(checkpoint)).values()
    assert len(examples) == PICTURES
    assert {example.picture.shape for example in examples} == {(272, 272, 3), (270, 270, 3)}
    assert {example.latent.shape for example in examples} == {(4, 8, 8)}
    out = tmp_path / "out"
    arguments = ["--checkpoint", checkpoint, "--out", out, "--steps", 1, "--count", 3]
    assert main([str(argument) for argument in arguments]) == 0
    row = json.loads((out / "scores.json").read_text())["splits"]["train"]
    assert row["pictures"] == 3
    assert (out / "train.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "--steps 0: use 1 to 1000000"),
        ("--count", "0", "--count 0: use 1 to 1000000"),
        ("--batch-size", "-1", "--batch-size -1: use 1 to 1000000"),
        ("--guidance", "nan", "--guidance nan: give a number"),
        ("--guidance", "-inf", "--guidance -inf: give a number"),
        ("--device", "cuda:99", "--device cuda:99: cannot be used here"),
        ("--judge", "tiny-clip-juge", 'did you mean "tiny-clip-judge"?'),
        ("--root", "/nowhere", "no folder/latents/tiny4/64 there"),
        ("--root", "no-such://bucket", "--root no-such://bucket"),
        ("--out", "", '--out "": give a path on this machine'),
        ("--out", "s3://bucket/out", '--out "s3://bucket/out": give a path'),
        ("--checkpoint", "s3://bucket/run", 'checkpoint "s3://bucket/run": give a path'),
        ("--steps", "100000000000", "--steps 100000000000: use 1 to 1000000"),
        ("--out", __file__, "is a file; name a folder"),
        ("--out", f"{__file__}/under", "is a file; name a folder"),
    ],
)
def test_arguments_that_cannot_be_used(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    option: str,
    value: str,
    message: str,
) -> None:
    out = tmp_path / "out"
    arguments = ["--checkpoint", checkpoint, "--out", out, f"{option}={value}"]
    assert message in refused(capsys, 2, *arguments)
    assert not out.exists()


def test_weights_that_name_no_source(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As imported ones do."""
    tensors, metadata = weights_file.read(checkpoint)
    imported = {"imported": {"file": "x.pt", "sha256": "ab"}}
    path = tmp_path / "model.safetensors"
    weights_file.write(path, tensors, metadata.model_copy(update={"config": imported}))
    answer = refused(capsys, 2, "--checkpoint", tmp_path, "--out", tmp_path / "out")
    assert "they name no source" in answer


def test_roots_that_are_damaged(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A copy of the remote root, with a file of it missing, cut or another."""
    metadata = weights_file.read_metadata(checkpoint)
    remote, store = Store(metadata.config["data"]["root"]), Store(tmp_path / "root")
    for entry in remote.walk(""):
        store.write(entry.path, remote.read(entry.path))
    arguments = ["--checkpoint", checkpoint, "--out", tmp_path / "out", "--root", store.root]
    mds = next(name for name in store.names(LATENTS) if ".mds" in name)
    whole = store.read(f"{LATENTS}/{mds}")
    store.write(f"{LATENTS}/{mds}", whole[:-10])
    assert f"{LATENTS}/{mds}" in refused(capsys, 1, *arguments)
    store.write(f"{LATENTS}/{mds}", whole)
    store.delete(f"{LATENTS}/commits/00000.json")
    assert "no shard 00000 in" in refused(capsys, 2, *arguments)
    for content in (b"{}", b"[]", b'{"inputs": [', b"\xff"):
        store.write(f"{LATENTS}/index.json", content)
        assert "no index of MDS shards" in refused(capsys, 2, *arguments)
    store.write(f"{LATENTS}/index.json", b'{"version": 2, "inputs": [], "shards": []}')
    assert "0 different captions" in refused(capsys, 2, *arguments)


def test_a_root_that_may_not_be_read(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as a user who may read anything: the system call says it instead."""

    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied", "index.json")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    arguments = ["--checkpoint", checkpoint, "--out", tmp_path / "out", "--root", tmp_path]
    assert "ermission" in refused(capsys, 1, *arguments)

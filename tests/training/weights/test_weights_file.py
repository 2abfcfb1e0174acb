"""Weights files that are damaged or of another kind: a line, from every command that reads one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.core.errors import SettingError
from tests.training.test_generate import run_folder
from training import convert, generate, scores
from training.config.load import resolve
from training.weights import weights_file

Tensors = dict[str, Tensor]
Damage = Callable[[Path, dict[str, Any], Tensors], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("weights") / "run", "full") / "model.safetensors"


def metadata(change: Callable[[dict[str, Any]], Any] | str) -> Damage:
    """The file with another metadata: what `change` makes of it or leaves in it, or a text."""

    def write(path: Path, record: dict[str, Any], tensors: Tensors) -> None:
        text = change if isinstance(change, str) else ""
        if not isinstance(change, str):
            found = change(record)
            text = json.dumps(record if found is None else found)
        save_file(tensors, path, {weights_file.METADATA_KEY: text})

    return write


def model(**changes: Any) -> Damage:
    return metadata(lambda record: record["model"].update(changes))


def tensors(change: Callable[[Tensors], Any]) -> Damage:
    def write(path: Path, record: dict[str, Any], own: Tensors) -> None:
        change(own)
        save_file(own, path, {weights_file.METADATA_KEY: json.dumps(record)})

    return write


def content(data: bytes) -> Damage:
    return lambda path, *_: bytes_written(path, data)


def bytes_written(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def cut(path: Path, record: dict[str, Any], own: Tensors) -> None:
    metadata(lambda _: None)(path, record, own)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def folder(path: Path, *_: Any) -> None:
    path.unlink()
    path.mkdir()


FIRST = "blocks.0.attn.qkv.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
HEADER: dict[str, tuple[Damage, str]] = {
    "empty": (content(b""), "is empty"),
    "a folder": (folder, "no file"),
    "a pointer": (content(LFS), "git lfs pull"),
    "no safetensors": (content(b"not weights at all" * 9), "no safetensors file"),
    "cut": (cut, "truncated"),
    "metadata cut": (metadata('{"run": "toy", "sta'), "broken metadata (no JSON"),
    "metadata empty": (metadata(""), "broken metadata (no JSON"),
    "metadata deep": (metadata("[" * 100_000), "broken metadata (no JSON"),
    "metadata a list": (metadata(lambda record: [record]), "expected a mapping, found list"),
    "metadata a number": (metadata("7"), "expected a mapping, found int"),
    "newer": (metadata(lambda r: r.update(schema_version=3)), "upgrade the package"),
    "version a text": (metadata(lambda r: r.update(schema_version="2")), "schema_version '2'"),
    "scale NaN": (metadata(lambda r: r["vae"].update(scale=float("nan"))), "NaN is no number"),
    "scale 0": (metadata(lambda r: r["vae"].update(scale=0.0)), "vae.scale 0.0: must be above 0"),
    "no objective": (metadata(lambda r: r.pop("objective") and None), "objective is missing"),
    "objective a text": (metadata(lambda r: r.update(objective="edm")), "broken metadata (obj"),
    "objective's name a list": (
        metadata(lambda r: r["objective"].update(name=[])),
        "broken metadata (objective: name []",
    ),
    "half a character": (metadata(lambda r: r.update(run="\ud800")), "broken metadata (no JSON"),
    "sigma a text": (metadata(lambda r: r["objective"].update(sigma_data="1")), "sigma_data '1'"),
    "text mode": (metadata(lambda r: r.update(text="half")), "broken metadata (text: Input"),
    "width in quotes": (model(width="32"), "broken metadata (model: width: Input should be"),
    "no such width": (model(width=33), "model: width 33: choose a multiple of head_dim"),
    "half a block": (model(depth=4.5), "model: depth: Input should be"),
    "unknown size": (model(widht=32), "model: widht: Unexpected"),
    "other channels": (model(in_channels=16), "model.in_channels 16 does not fit"),
    "other resolution": (metadata(lambda r: r.update(resolution=128)), "input_size 64 does not"),
}
TENSORS: dict[str, tuple[Damage, str]] = {
    "unknown sigma": (
        metadata(lambda r: r["objective"].update(sigma_mean=1.0)),
        "broken metadata (objective: ",
    ),
    "sigma below 0": (
        metadata(lambda r: r["objective"].update(sigma_data=-1.0)),
        "broken metadata (objective: ",
    ),
    "deeper": (model(depth=5), "not its metadata's network: blocks.1.mlp.w1"),
    "much deeper": (model(depth=10**9), "blocks"),
    "missing": (tensors(lambda t: t.pop(FIRST)), f"{FIRST} is missing, expected (96, 32)"),
    "extra": (tensors(lambda t: t.update(x=torch.ones(2))), "x is (2,), expected missing"),
    "shape": (tensors(lambda t: t.update({FIRST: torch.ones(96, 31)})), f"{FIRST} is (96, 31)"),
    "type": (
        tensors(lambda t: t.update({FIRST: t[FIRST].long()})),
        f"{FIRST} is of type int64",
    ),
    "NaN": (
        tensors(lambda t: t[FIRST].view(-1)[3:5].fill_(float("nan"))),
        f"2 of 3072 values of {FIRST} are NaN or infinite",
    ),
    "infinite": (
        tensors(lambda t: t["pos_embed"].view(-1)[:1].fill_(float("-inf"))),
        "values of pos_embed are NaN or infinite",
    ),
    "no tensors": (tensors(lambda t: t.clear()), "0 tensors"),
}


def damaged(whole: Path, path: Path, damage: Damage) -> Path:
    path.mkdir()
    file = path / "model.safetensors"
    file.touch()
    record = weights_file.read_metadata(whole).model_dump(mode="json")
    record["config"]["data"] = {"sources": ["toy"], "split": "train", "root": "/nowhere"}
    damage(file, record, load_file(whole))
    return file


def answer(capsys: pytest.CaptureFixture, main: Callable[..., int], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("kind", [*HEADER, *TENSORS])
def test_every_command_says_it_in_a_line(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    damage, message = (HEADER | TENSORS)[kind]
    file, out = damaged(whole, tmp_path / "run", damage), tmp_path / "out"
    run, common = file.parent, ["--out", out]
    found = [
        answer(capsys, generate.main, "--checkpoint", run, "--prompts", "a fox", *common),
        answer(capsys, convert.main, "export", run, "--to", "official", "--out", f"{out}.pt"),
        answer(capsys, convert.main, "export", run, "--to", "diffusers", *common),
    ]
    if kind in HEADER:  # what it has to look at before it paints
        found.append(answer(capsys, scores.main, "--checkpoint", run, *common))
        with pytest.raises(SettingError) as error:
            resolve({"init_from": str(run), "stages": {"full": {}}})
        found.append(str(error.value))
    for line in found:
        assert message in line
        assert "\n" not in line
        assert len(line) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

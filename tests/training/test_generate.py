"""From a weights file alone to pictures on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.core.errors import SettingError
from pipeline.core.manifest import LatentsManifest, TextManifest
from tests.training.helpers.groups import SHIPPED
from training.config.sampling_options import device_of, read_prompts
from training.generate import main
from training.generator import Generator
from training.network.config import DiTConfig
from training.network.dit import MicroDiT
from training.objectives.edm import EDM
from training.objectives.flow import Flow
from training.observe.image_grid import contact_sheet
from training.weights import weights_file

PROMPTS = ["avocado on a blue background", "rocket", "rocket"]


def metadata_of(
    config: DiTConfig, text: Literal["full", "trimmed"]
) -> weights_file.WeightsMetadata:
    vae, encoder = SHIPPED.facts()
    common: dict[str, Any] = {"source": "openmoji", "dtype": "float16"}
    latents = LatentsManifest(**common, vae=vae, resolution=64, crop="center", latents="mean")
    captions = TextManifest(**common, text_encoder=encoder, text=text, captions="alt")
    network = MicroDiT(config)
    return weights_file.WeightsMetadata(
        run="toy",
        stage="full",
        step=5,
        weights="ema",
        ema=0.9,
        **weights_file.facts(network, EDM()),
        resolution=64,
        vae=vae,
        text_encoder=encoder,
        text=text,
        captions="alt",
        latents_manifests={"openmoji": latents},
        text_manifests={"openmoji": captions},
        attribution=weights_file.attributions(["openmoji", "other"]),
        config={"seed": 1},
    )


def run_folder(folder: Path, mode: Literal["full", "trimmed"]) -> Path:
    """Weights of an untrained network under this name."""
    vae, encoder = SHIPPED.facts()
    config = DiTConfig(
        input_size=8,
        in_channels=vae.channels,
        width=32,
        depth=4,
        head_dim=16,
        multiple_of=16,
        mixer_width=48,
        mixer_depth=2,
        num_experts=2,
        caption_width=encoder.width,
        caption_length=encoder.length,
    )
    network = MicroDiT(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir(parents=True)
    weights_file.write(
        folder / "model.safetensors", network.state_dict(), metadata_of(config, mode)
    )
    return folder


@pytest.fixture(scope="module", params=["trimmed", "full"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("generate") / "run", request.param)


def test_weights_round_trip(checkpoint: Path, tmp_path: Path) -> None:
    network, metadata = weights_file.load(checkpoint / "model.safetensors")
    assert metadata.noise() == EDM()
    assert metadata.attribution == ["Trained on pictures of OpenMoji (openmoji.org), CC BY-SA 4.0"]
    tensors = {**network.state_dict(), "x_embedder.proj.bias": torch.full((32,), 3.0)}
    weights_file.write(tmp_path / "again.safetensors", tensors, metadata)
    again, other = weights_file.load(tmp_path / "again.safetensors")
    assert other == metadata
    for name, expected in tensors.items():
        assert torch.equal(again.state_dict()[name], expected), name
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


def test_weights_from_before_there_were_objectives(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    record = weights_file.read_metadata(path).model_dump(mode="json")
    del record["objective"]
    edm = {"sigma_data": 0.7, "sigma_min": 0.01, "sigma_max": 40.0, "p_mean": 0.0, "p_std": 0.6}
    old = record | {"schema_version": 1, "edm": edm}
    save_file(
        load_file(path), tmp_path / "old.safetensors", {weights_file.METADATA_KEY: json.dumps(old)}
    )
    _, metadata = weights_file.load(tmp_path / "old.safetensors")
    assert metadata.noise() == EDM(**edm)
    assert metadata.ema == 0.9


def test_every_objective_is_in_the_metadata(checkpoint: Path, tmp_path: Path) -> None:
    network, metadata = weights_file.load(checkpoint / "model.safetensors")
    flow = Flow(logit_mean=0.25, shift=2.0)
    other = metadata.model_copy(update=weights_file.facts(network, flow))
    weights_file.write(tmp_path / "model.safetensors", network.state_dict(), other)
    assert weights_file.read_metadata(tmp_path / "model.safetensors").noise() == flow


def test_pictures_on_disk(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--out", str(tmp_path), "--prompts", *PROMPTS]
    assert main([*arguments, "--steps", "2", "--seed", "7", "--batch-size", "2"]) == 0
    assert f"3 pictures, all on {tmp_path / 'sheet.png'}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0000-avocado-on-a-blue-background.png",
        "0001-rocket.png",
        "0002-rocket.png",
        "sheet.png",
    ]
    picture = Image.open(tmp_path / "0000-avocado-on-a-blue-background.png")
    assert picture.size == (64, 64)
    assert isinstance(picture, Image.Image)
    assert picture.info["prompt"] == PROMPTS[0]
    assert picture.info["seed"] == "7"
    assert "OpenMoji" in picture.info["attribution"]
    assert picture.tobytes() != Image.open(tmp_path / "0001-rocket.png").tobytes()


def test_picture_is_a_function_of_seed_and_place(checkpoint: Path) -> None:
    generator = Generator(str(checkpoint))
    reports: list[tuple[int, int]] = []

    def paint(prompts: list[str], **options: Any) -> np.ndarray:
        return generator.generate(prompts, steps=2, **options)

    pictures = paint(PROMPTS, batch_size=2, report=lambda done, all_: reports.append((done, all_)))
    assert pictures.shape == (3, 64, 64, 3)
    assert pictures.dtype == np.uint8
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # Other prompts and another batch size move a picture by rounding at most.
    alone = paint(["x", "rocket"], batch_size=16)
    assert np.abs(alone[1].astype(int) - pictures[1]).max() <= 1
    assert (pictures[1] != pictures[2]).any()  # the same prompt in another place
    assert (paint(PROMPTS, seed=1) != pictures).any()


def test_encoders_must_be_those_of_training(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    metadata = weights_file.read_metadata(checkpoint / "model.safetensors")
    vae = metadata.vae.model_copy(update={"weights_sha256": "ab", "scale": 0.5})
    changed = metadata.model_copy(update={"vae": vae})
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {weights_file.METADATA_KEY: changed.model_dump_json()})
    with pytest.raises(SettingError, match="vae tiny4 has changed: weights_sha256: expected ab"):
        Generator(str(tmp_path))


def test_unusable_checkpoints(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "model.safetensors"

    def answer() -> str:
        assert main(["--checkpoint", str(tmp_path), "--out", "o", "--prompts", "p"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "no file" in answer()
    whole = (checkpoint / "model.safetensors").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in answer()
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors, path)
    assert "no metadata" in answer()
    record = weights_file.read_metadata(checkpoint / "model.safetensors").model_dump(mode="json")
    save_file(
        tensors, path, {weights_file.METADATA_KEY: json.dumps(record | {"schema_version": 99})}
    )
    assert "upgrade the package" in answer()
    save_file(tensors, path, {weights_file.METADATA_KEY: json.dumps(record | {"vae": 1})})
    assert "broken metadata (vae" in answer()
    save_file(
        tensors,
        path,
        {weights_file.METADATA_KEY: json.dumps(record | {"objective": {"name": "x"}})},
    )
    assert "broken metadata (objective: name x: known are edm, flow" in answer()
    record["model"]["depth"] = 5
    save_file(tensors, path, {weights_file.METADATA_KEY: json.dumps(record)})
    assert "not its metadata's network: blocks.1.mlp.w1 is" in answer()


def test_prompts_from_files_and_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\n a dog \nsun\u2028set".encode())
    assert read_prompts([str(file), "a fox"]) == ["a cat", "a dog", "sun\u2028set", "a fox"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_prompts(["~/prompts.txt"]) == ["a cat", "a dog", "sun\u2028set"]
    for prompt in ("~a~", "x" * 5000, "a cat/dog, 50 mm f/1.8", "It ends. Here.", "U.S.A.", "v1.5"):
        assert read_prompts([prompt]) == [prompt]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("{folder}/bytes.txt", "cannot be read as text"),
        ("{folder}/", "cannot be read as text"),
        ("{folder}/promts.txt", 'no such file; did you mean "{folder}/prompts.txt"?'),
        ("{folder}/promts", 'no such file; did you mean "{folder}/prompts.txt"?'),
        ("promts.txt", "promts.txt: no such file"),
        ("my list.csv", "my list.csv: no such file"),
        (" ", "one of them is empty"),
        ("a \udcff fox", r"a \udcff fox: is no UTF-8 text"),
        ("{folder}/empty.txt", "give texts, or a file with one a line"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, argument: str, message: str) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SettingError) as error:
        read_prompts([argument.format(folder=tmp_path)])
    assert message.format(folder=tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "--steps 0: use 1 to 1000000"),
        ("--batch-size", "-1", "--batch-size -1: use 1 to 1000000"),
        ("--guidance", "nan", "--guidance nan: give a number of 0 or more"),
        ("--guidance", "inf", "--guidance inf: give a number of 0 or more"),
        ("--guidance", "-1", "--guidance -1.0: give a number of 0 or more"),
        ("--guidance", "1e30", "--guidance 1e+30: the latents of pictures 0 to 0 are no numbers"),
        ("--device", "cuda:99", "--device cuda:99: cannot be used here"),
        ("--device", "meta", "--device meta: cannot be used here"),
        ("--device", "gpu", "--device gpu: cannot be used here"),
        ("--out", "", '--out "": give a path on this machine'),
        ("--out", "s3://bucket/out", '--out "s3://bucket/out": give a path'),
        ("--checkpoint", "s3://bucket/run", 'checkpoint "s3://bucket/run": give a path'),
        ("--steps", "100000000000", "--steps 100000000000: use 1 to 1000000"),
        ("--out", __file__, f"--out {__file__}: {__file__} is a file"),
        ("--out", f"{__file__}/under", f"{__file__} is a file"),
        ("--out", "o" * 300, "cannot be a folder"),
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
    arguments = ["--checkpoint", str(checkpoint), "--out", str(out), "--prompts", "a fox"]
    assert main([*arguments, "--steps", "2", f"{option}={value}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not out.exists()


def test_there_is_one_cpu() -> None:
    """Torch takes cpu:7 for it; safetensors does not, and called the weights truncated."""
    assert str(device_of("cpu:7")) == "cpu"


def test_a_folder_that_cannot_be_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """It was there when the command began; then a folder has the sheet's name."""
    (tmp_path / "sheet.png").mkdir()
    arguments = ["--checkpoint", str(checkpoint), "--out", str(tmp_path), "--prompts", "a fox"]
    assert main([*arguments, "--steps", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"cannot write {tmp_path}" in lines[0]


def test_sheet_shows_pairs_with_captions() -> None:
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    cells = [(f"caption {i} " + "long " * 20, [black, white]) for i in range(5)]
    sheet = contact_sheet(cells, columns=3, footer="credits")
    assert sheet.width == 3 * (2 * 128 + 8) + 8
    pixels = np.asarray(sheet)
    assert not pixels[8 : 8 + 128, 8 : 8 + 128].any()  # enlarged twice
    assert pixels[8 : 8 + 128, 8 + 128 : 8 + 256].all()
    assert not pixels[8 + 128 : 8 + 128 + 45, 8:264].all()  # the caption's ink

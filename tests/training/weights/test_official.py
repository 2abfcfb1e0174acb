"""The official code's checkpoints: recognised by shape, read without running code, written back."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.core.errors import SettingError
from tests.checkout import VECTORS
from tests.training.helpers.groups import make_encoders
from training.convert import main
from training.generator import Generator
from training.network.config import MODELS, DiTConfig
from training.network.dit import MicroDiT
from training.network.layers import position_table
from training.weights import official, weights_file

SHAPES: dict[str, dict[str, list[int]]] = json.loads(
    (VECTORS / "state_dict_shapes.json").read_text()
)
STATE = {
    key.removeprefix("state."): value
    for key, value in load_file(VECTORS / "microdit_small.safetensors").items()
    if key.startswith("state.")
}
SMALL = """
model:
  arch: custom
  width: 64
  depth: 4
  head_dim: 16
  multiple_of: 32
  mixer_width: 48
  mixer_depth: 2
  num_experts: 4
"""


class Evil:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "code ran"))


def composer(state: dict[str, Tensor], **beside: Tensor) -> dict[str, Any]:
    """A checkpoint of the official trainer, which keeps its frozen encoders in the model."""
    return {
        "state": {
            "model": {f"dit.{name}": value for name, value in state.items()} | beside,
            "timestamp": {"Timestamp": {"total_wct": datetime.timedelta(seconds=3)}},
            "metadata": {"composer_env_info": {"torch_version": torch.__version__}},
        },
        "rng": [{"numpy": ("MT19937", np.arange(4, dtype=np.uint32), 1, 0, 0.0)}],
    }


def small(folder: Path) -> list[str]:
    """Arguments that say what the vectors' network is."""
    encoders = make_encoders(folder / "encoders", width=48, length=7)
    (folder / "small.yaml").write_text(SMALL)
    arch = ["--arch", str(folder / "small.yaml")]
    return [*arch, "--vae", encoders.vae, "--text-encoder", encoders.text]


@pytest.mark.parametrize("arch", SHAPES)
@pytest.mark.parametrize("channels", [4, 16])
def test_released_shapes_are_recognised(arch: str, channels: int) -> None:
    shapes = dict(SHAPES[arch])
    if channels == 16:  # facts/method.md: only what touches latents differs
        shapes["x_embedder.proj.weight"] = [MODELS[arch].width, 16, 2, 2]
        shapes["mask_token"] = [1, 1, 64]
        shapes["final_layer.linear.weight"] = [64, MODELS[arch].width]
        shapes["final_layer.linear.bias"] = [64]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    grid = 32 if arch == "MicroDiT_XL_2" else 16
    tensors["pos_embed"] = position_table(MODELS[arch].width, grid, grid / 16)[None]
    config = official.recognise(Path("x.pt"), tensors)
    assert (config.in_channels, config.input_size, config.pos_interp_scale, config.width) == (
        channels,
        2 * grid,
        grid / 16,
        MODELS[arch].width,
    )
    tensors["blocks.3.mlp.w1"] = torch.empty(8, 1, 1, device="meta")
    with pytest.raises(SettingError, match=rf"not {arch}: blocks.3.mlp.w1 is \(8, 1, 1\), expect"):
        official.recognise(Path("x.pt"), tensors)


@pytest.mark.parametrize("kind", ["bare", "prefixed", "composer", "safetensors", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(
    tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, dtype: torch.dtype
) -> None:
    """Official file -> ours -> official: the same names, types and bits."""
    state = {name: value.to(dtype) for name, value in STATE.items()}
    file = tmp_path / ("in.safetensors" if kind == "safetensors" else "in.pt")
    if kind == "safetensors":
        save_file(state, file)
    elif kind == "composer":
        torch.save(composer(state, **{"vae.conv": torch.zeros(2), "text.x": torch.ones(1)}), file)
    else:
        prefix = {"bare": "", "prefixed": "dit.", "compiled": "module.dit._orig_mod."}[kind]
        torch.save({prefix + name: value for name, value in state.items()}, file)
    out, back = tmp_path / "out", tmp_path / "back.pt"
    assert main(["import", str(file), "--out", str(out), *small(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert ("2 tensors beside the network left out" in said) == (kind == "composer")
    assert "shift_factor" in said  # of tiny4, which the official code would leave out
    network, metadata = weights_file.load(out / "model.safetensors")
    assert (metadata.resolution, metadata.text, metadata.latents_manifests) == (64, "full", {})
    assert network.config.pos_interp_scale == 1
    assert metadata.objective["sigma_data"] == 0.9
    x, c_noise, y = torch.randn(1, 4, 8, 8), torch.zeros(1), torch.randn(1, 7, 48)
    assert network(x, c_noise, y).dtype == torch.float32
    assert main(["export", str(out), "--to", "official", "--out", str(back)]) == 0
    found = torch.load(back, weights_only=True)
    # In the order of registration, as in the official files; a safetensors file has its own.
    assert list(found) == list(network.state_dict())
    assert list(found) != list(load_file(out / "model.safetensors"))
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value), name
    MicroDiT(network.config).load_state_dict(found)
    again = tmp_path / "again.safetensors"
    assert main(["export", str(out), "--to", "safetensors", "--out", str(again)]) == 0
    assert weights_file.read_metadata(again) == metadata
    assert all(torch.equal(value, state[name]) for name, value in load_file(again).items())


def test_an_imported_file_paints(tmp_path: Path) -> None:
    config = DiTConfig(
        input_size=8,
        width=64,
        depth=4,
        head_dim=16,
        multiple_of=32,
        mixer_width=48,
        mixer_depth=2,
        num_experts=4,
        caption_width=128,
    )
    network = MicroDiT(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    torch.save(network.state_dict(), tmp_path / "w.pt")
    (tmp_path / "small.yaml").write_text(SMALL)
    encoders = ["--vae", "tiny4", "--text-encoder", "tiny-clip"]
    arguments = ["import", str(tmp_path / "w.pt"), "--arch", str(tmp_path / "small.yaml")]
    assert main([*arguments, *encoders]) == 0
    picture = Generator(str(tmp_path / "w")).generate(["a fox"], steps=2)
    assert picture.shape == (1, 64, 64, 3)
    assert picture.std() > 0


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_files_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = small(tmp_path)
    file = tmp_path / "in.pt"

    def answer(*more: str) -> str:
        return refused(capsys, "import", str(file), "--out", str(tmp_path / "o"), *own, *more)

    assert "no such file" in answer()
    torch.save(STATE, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in answer()
    file.write_bytes(b"")
    assert "truncated" in answer()
    file.write_bytes(b"not a checkpoint at all")
    assert "truncated" in answer()
    file.with_suffix(".safetensors").write_bytes(whole[:100])
    text = refused(capsys, "import", str(file.with_suffix(".safetensors")), *own)
    assert "truncated" in text
    torch.save({"a": 1}, file)
    assert "no state dict" in answer()
    torch.save({"weight": torch.ones(2)}, file)
    assert "no MicroDiT: x_embedder.proj.weight is missing (has weight)" in answer()
    torch.save({k: v for k, v in STATE.items() if k != "blocks.2.norm2.weight"}, file)
    assert "blocks.2.norm2.weight is missing, expected (64,)" in answer()
    torch.save(STATE | {"blocks.9.x": torch.ones(2)}, file)
    assert "blocks.9.x is (2,), expected missing" in answer()
    torch.save(STATE | {"pos_embed": torch.zeros(1, 16, 64)}, file)
    assert "pos_embed is no sine-cosine table of 4 x 4 patches" in answer()
    torch.save(STATE, file)
    assert "not the given sizes: " in answer("--arch", "MicroDiT_XL_2")
    assert 'unknown; did you mean "MicroDiT_XL_2"?' in answer("--arch", "MicroDiT_XL")
    assert "token width 48, but 1024 with --text-encoder dfn5b" in answer(
        "--text-encoder", "dfn5b-h14"
    )
    assert "latent channels 4, but 16 with --vae ostris16" in answer("--vae", "ostris16")
    assert "blocks and 2 mixer blocks are of none of MicroDiT_Tiny_2" in refused(
        capsys, "import", str(file)
    )


@pytest.mark.parametrize("where", ["bare", "rng", "name"])
def test_pickled_objects_are_not_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    sign, file = tmp_path / "sign", tmp_path / "in.pt"
    evil: Any = Evil(sign)
    whole = {"bare": evil, "rng": composer(STATE) | {"rng": evil}, "name": STATE | {"x": evil}}
    torch.save(whole[where], file)
    assert "holds pickled objects" in refused(capsys, "import", str(file), *small(tmp_path))
    assert not sign.exists()
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.load(file, weights_only=False)  # it would have run
    assert sign.exists()


def test_a_pickle_that_is_not_torchs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import pickle

    sign, file = tmp_path / "sign", tmp_path / "in.pt"
    file.write_bytes(pickle.dumps(Evil(sign)))
    refused(capsys, "import", str(file), *small(tmp_path))
    assert not sign.exists()


def test_exports_name_their_ending(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(STATE, tmp_path / "in.pt")
    assert main(["import", str(tmp_path / "in.pt"), *small(tmp_path)]) == 0
    answer = refused(
        capsys, "export", str(tmp_path / "in"), "--to", "official", "--out", str(tmp_path)
    )
    assert "give a file that ends in .pt" in answer
    target = tmp_path / "in.pt/under.pt"
    assert "in.pt is a file; name a folder" in refused(
        capsys, "export", str(tmp_path / "in"), "--to", "official", "--out", str(target)
    )
    assert "no file" in refused(
        capsys, "export", str(tmp_path / "none"), "--to", "official", "--out", "x.pt"
    )

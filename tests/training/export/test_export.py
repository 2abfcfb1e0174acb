"""A folder that diffusers turns into pictures where this package is not installed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import pytest
import torch

from pipeline.core.errors import SettingError
from pipeline.core.manifest import TextFacts
from pipeline.encoders import load_text
from pipeline.encoders.openclip import OpenClip
from tests.checkout import ROOT
from tests.pipeline.helpers.text_folders import save_clip, save_t5
from tests.training.test_generate import run_folder
from training.convert import main
from training.export import text, transformer
from training.export.bundle import CannotBundle, bundle
from training.export.pipeline import MicroDiTPipeline
from training.generator import Generator
from training.objectives import OBJECTIVES
from training.objectives.edm import EDM
from training.objectives.flow import Flow
from training.objectives.sampler import Solver, sample
from training.weights import weights_file

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own

ISOLATED = ROOT / "tests/training/helpers/isolated_paint.py"
CAPTIONS = [
    "avocado",
    "",
    "A RED fox's   tail,\tover &amp; under 3 hills!",
    "wow! ¡qué niño! naïve café — “quoted” 日本語 🦊",
    "word " * 90,
    "x" * 200,
]


def paint_elsewhere(folder: Path, scratch: Path, **options: Any) -> np.ndarray:
    """What the folder's own code paints in a process without this package."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    env |= {"HF_MODULES_CACHE": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
    target = scratch / "pictures.npy"
    result = subprocess.run(
        [sys.executable, "-P", str(ISOLATED), str(folder), str(target), json.dumps(options)],
        env=env,
        cwd=scratch,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return np.load(target)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "trimmed"])
def test_a_folder_paints_without_this_package(
    tmp_path: Path, mode: Literal["full", "trimmed"]
) -> None:
    run, out = run_folder(tmp_path / "run", mode), tmp_path / "out"
    assert main(["export", str(run), "--to", "diffusers", "--out", str(out)]) == 0
    prompts = ["avocado on a blue background", "Rocket &amp; moon", "rocket"]
    generator = Generator(str(run), "cpu")
    expected = generator.generate(prompts, guidance=3.0, steps=3, seed=5)
    found = paint_elsewhere(
        out, tmp_path, prompts=prompts, guidance_scale=3.0, num_inference_steps=3, seed=5
    )
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1, f"{(difference > 0).mean():.4%} of values differ"
    assert expected.std() > 5
    assert "OpenMoji" in (out / "README.md").read_text()
    tensors = weights_file.read_tensors(out / "transformer/diffusion_pytorch_model.safetensors")
    own = weights_file.read_tensors(run / "model.safetensors")
    assert {f"dit.{name}" for name in own} == tensors.keys()
    assert all(torch.equal(tensors[f"dit.{name}"], value) for name, value in own.items())
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def assert_same_tokens(encoder: Any, scratch: Path, tolerance: float) -> None:
    """The pipeline's own reading of captions gives the encoder's rows and lengths."""
    exported = text.convert(encoder, scratch)
    folder = scratch / "saved"
    exported.model.save_pretrained(folder)
    exported.tokenizer.save_pretrained(folder)
    model = type(exported.model).from_pretrained(folder).eval()
    tokenizer = type(exported.tokenizer).from_pretrained(folder)
    for mode in ("full", "trimmed"):
        pipe = MicroDiTPipeline(None, None, model, tokenizer, mode, **exported.settings)  # pyright: ignore
        y, y_mask = pipe.encode_prompt(CAPTIONS)
        tokens, lengths = encoder.encode(CAPTIONS)
        tokens = tokens.half().float()
        if mode == "trimmed":
            assert y_mask is not None
            assert y_mask.sum(dim=1).tolist() == lengths.tolist()
            tokens = tokens[:, : int(lengths.max())] * y_mask[..., None]
        assert y.shape == tokens.shape
        # The rounding to float16 may fall to the other side: one unit in the last place.
        assert ((y - tokens).abs() <= tolerance + tokens.abs() / 1000).all()


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-clip-judge"])
def test_shipped_text_towers_are_the_same_in_transformers(tmp_path: Path, name: str) -> None:
    assert_same_tokens(load_text(name), tmp_path, 1e-5)


@pytest.mark.parametrize("custom", [False, True])
def test_clips_own_tokenizer_and_activation(tmp_path: Path, custom: bool) -> None:
    """As in DFN5B ViT-H-14: open_clip's tokenizer of 49,408 words, 77 tokens, quick-GELU."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 8}
    tower = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3}
    kind: Any = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(32, {**sizes, "image_size": 8}, tower, quick_gelu=True).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    facts = TextFacts(name="like-dfn", repo="", width=64, length=77)
    assert_same_tokens(OpenClip(model, open_clip.get_tokenizer("ViT-B-32"), facts), tmp_path, 1e-4)


@pytest.mark.parametrize("kind", ["clip_text_model", "t5"])
def test_transformers_own_encoders(tmp_path: Path, kind: str) -> None:
    save = save_t5 if kind == "t5" else save_clip
    encoder = load_text(str(save(tmp_path / "encoder", kind)))
    assert_same_tokens(encoder, tmp_path, 1e-5)


def test_towers_that_transformers_does_not_know(tmp_path: Path) -> None:
    encoder: Any = load_text("tiny-clip")
    encoder._tower.transformer.resblocks[0].mlp.gelu = torch.nn.SiLU()
    with pytest.raises(SettingError, match=r"tiny-clip: its blocks \(SiLU"):
        text.convert(encoder, tmp_path)


@pytest.mark.parametrize("start", ["training.export.transformer", "training.export.pipeline"])
def test_bundled_code_names_nothing_of_ours(start: str) -> None:
    files = bundle(start, "code")
    assert bundle(start, "code") == files
    top = ast.parse(files["code.py"])
    named = {n.module for n in ast.walk(top) if isinstance(n, ast.ImportFrom) and n.level}
    assert {f"{name.replace('.', '/')}.py" for name in named if name} == files.keys() - {"code.py"}
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).split(".")[0] not in ("training", "pipeline"), name


def test_bundled_code_is_the_packages_own() -> None:
    """Line by line, but for the imports of ours."""
    files = bundle("training.export.transformer", "code")
    source = (ROOT / "training/network/dit.py").read_text().splitlines()
    (copy,) = (text for name, text in files.items() if name.endswith("/network_dit.py"))
    different = [
        (ours, theirs)
        for ours, theirs in zip(source, copy.splitlines()[1:], strict=True)
        if ours != theirs
    ]
    assert all(ours.startswith("from training.") for ours, _ in different)
    assert all(theirs.startswith("from .") for _, theirs in different)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import composer", "imports composer; exported code may not"),
        ("from streaming import x", "imports streaming"),
        ("from . import x", "a relative import"),
        (
            "from training.network import dit",
            "imports a module of training.network; import its names",
        ),
        ("import training.network.dit", "imports training.network.dit"),
        ("A = 'training.masking.deferred:draw'", "is imported by name alone"),
        ("from training.nothing import x", "training.nothing: no such module"),
    ],
)
def test_code_that_would_not_work_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    (tmp_path / "start_of_bundle.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CannotBundle, match=message):
        bundle("start_of_bundle", "code")


def test_every_objective_is_exported() -> None:
    """And through a file, as diffusers keeps a component's settings."""
    assert transformer.OBJECTIVES.keys() == OBJECTIVES.keys()
    assert all(kind.name == name for name, kind in transformer.OBJECTIVES.items())


@pytest.mark.parametrize("objective", [EDM(sigma_data=0.7), Flow(shift=2.0)])
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_a_saved_component_samples_as_training_does(
    tmp_path: Path, objective: EDM | Flow, solver: Solver
) -> None:
    network, _ = weights_file.load(run_folder(tmp_path / "run", "full") / "model.safetensors")
    facts = weights_file.facts(network, objective)
    model = transformer.MicroDiTModel(facts["model"], facts["objective"])
    model.dit = network
    model.save_pretrained(tmp_path / "component")
    loaded = transformer.MicroDiTModel.from_pretrained(tmp_path / "component")
    config, generator = network.config, torch.Generator().manual_seed(0)
    noise = torch.randn(1, *loaded.latent_shape(), generator=generator)
    y = torch.randn(1, config.caption_length, config.caption_width, generator=generator)
    expected = sample(network, objective, noise, y, steps=3, guidance=2.0, solver=solver)
    found = loaded.sample(noise, y, None, steps=3, guidance=2.0, solver=solver)
    assert torch.equal(found, expected)


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = run_folder(tmp_path / "run", "full")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert main(["export", str(run), "--to", "diffusers", "--out", str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    under = tmp_path / "out/mine/under"
    assert main(["export", str(run), "--to", "diffusers", "--out", str(under)]) == 2
    assert "mine is a file; name a folder" in capsys.readouterr().err

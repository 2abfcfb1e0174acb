"""A weights file -> a folder for `diffusers.DiffusionPipeline.from_pretrained`, code included."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.core.errors import SettingError
from training.config.sampling_options import require_folder
from training.export import text
from training.export.bundle import bundle
from training.export.transformer import MicroDiTModel
from training.generator import Generator
from training.weights.weights_file import WeightsMetadata

TRANSFORMER, PIPELINE = "microdit", "pipeline"  # names of modules in the folder


def write(path: Path, out: Path) -> None:
    """The folder appears whole under its name, or not at all.

    Raises:
        SettingError: no usable weights, encoders that have changed, or something at `out` already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"--out {out}: is there already; remove it, or name another folder")
    require_folder("--out", out)
    generator = Generator(str(path), "cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _fill(part, generator)
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fill(folder: Path, generator: Generator) -> None:
    metadata = generator.metadata
    with torch.device("meta"):
        model = MicroDiTModel(network=metadata.model, objective=metadata.objective)
    model.dit = generator.network
    model.save_pretrained(folder / "transformer")
    generator.vae.vae.save_pretrained(folder / "vae")
    encoder = text.convert(generator.text, folder)
    encoder.model.save_pretrained(folder / "text_encoder")
    encoder.tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    _write_code(folder / "transformer", bundle("training.export.transformer", TRANSFORMER))
    _write_code(folder, bundle("training.export.pipeline", PIPELINE))
    index = {
        "_class_name": [PIPELINE, "MicroDiTPipeline"],
        "_diffusers_version": version("diffusers"),
        "transformer": [TRANSFORMER, "MicroDiTModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", type(encoder.model).__name__],
        "tokenizer": ["transformers", type(encoder.tokenizer).__name__],
        "text": metadata.text,
        "latent_scale": metadata.vae.scale,
        "latent_shift": metadata.vae.shift,
        "attribution": metadata.attribution,
        **encoder.settings,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "README.md").write_text(_readme(metadata))


def _write_code(folder: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source, "utf-8")


def _readme(metadata: WeightsMetadata) -> str:
    facts: dict[str, Any] = {
        "run": f"{metadata.run}, stage {metadata.stage}, step {metadata.step}",
        "weights": metadata.weights,
        "resolution": f"{metadata.resolution} px",
        "vae": f"{metadata.vae.name} ({metadata.vae.repo})",
        "text encoder": f"{metadata.text_encoder.name} ({metadata.text_encoder.repo})",
    }
    lines = [
        "# A MicroDiT",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        *(f"- {line}" for line in metadata.attribution),
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        'folder = "."',
        "pipe = DiffusionPipeline.from_pretrained(",
        "    folder, custom_pipeline=folder, trust_remote_code=True",
        ")",
        'pipe("a red fox", seed=7).images[0].save("fox.png")',
        "```",
        "",
        "Needs `diffusers`, `transformers` and `torch`; with `ftfy`, prompts are cleaned as in",
        "training. The code is under the Apache-2.0 licence.",
        "",
    ]
    return "\n".join(lines)

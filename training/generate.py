"""Pictures from prompts: `python -m training.generate --checkpoint RUN --prompts … --out DIR`.

A checkpoint alone is enough: its metadata names the VAE and the text encoder, and how captions are
attended. Writes one PNG a prompt and sheet.png with all of them.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import program
from pipeline.core.errors import SettingError
from pipeline.core.location import located
from pipeline.core.version import version_line
from training import ranks
from training.config.sampling_options import check, read_prompts
from training.threads import share_cores
from training.weights import weights_metadata

if TYPE_CHECKING:
    import numpy as np


NAME_CHARACTERS = 60  # of a prompt in its picture's file name


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 after a line on standard error that says what to change; 1 where the disk
    fails."""
    program.begin()
    ranks.alone()
    options = _parser().parse_args(arguments)
    share_cores()
    try:
        prompts = read_prompts(options.prompts)
        check(options, ["steps", "batch_size"])
        weights_metadata.read_metadata(weights_metadata.find(options.checkpoint))
        from training.generator import Generator

        generator = Generator(options.checkpoint, options.device)
        report = Progress()
        try:
            pictures = generator.generate(
                prompts,
                options.guidance,
                options.steps,
                options.seed,
                options.batch_size,
                report,
                options.solver,
            )
        finally:
            report.close()
        sheet = write(Path(options.out), prompts, pictures, generator.metadata, vars(options))
    except SettingError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"generate: cannot write {options.out}: {error}", file=sys.stderr)
        return 1
    print(f"{len(prompts)} pictures, all on {sheet}")
    return 0


def write(
    out: Path,
    prompts: Sequence[str],
    pictures: np.ndarray,
    metadata: Any,
    options: dict[str, Any],
) -> Path:
    """One PNG a prompt, with what made it in its text fields, and the contact sheet; its path."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from training.observe.image_grid import contact_sheet

    out.mkdir(parents=True, exist_ok=True)
    footer = "; ".join(metadata.attribution)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        info = PngInfo()
        info.add_itxt("prompt", prompt)
        for name in ("guidance", "steps", "seed", "solver"):
            info.add_text(name, str(options[name]))
        info.add_text("index", str(index))
        info.add_text("model", f"{metadata.run}, stage {metadata.stage}, step {metadata.step}")
        if footer:
            info.add_itxt("attribution", footer)
        Image.fromarray(picture).save(out / f"{index:04d}-{_slug(prompt)}.png", pnginfo=info)
    sheet = out / "sheet.png"
    cells = [(prompt, [picture]) for prompt, picture in zip(prompts, pictures, strict=True)]
    contact_sheet(cells, footer=footer).save(sheet)
    return sheet


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.generate", description="Pictures from prompts."
    )
    parser.add_argument("--version", action="version", version=version_line())
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        type=located,
        help="a run's folder, or a .safetensors file of one",
    )
    add("--prompts", required=True, nargs="+", help="texts, or files with one a line")
    add("--out", required=True, type=located, help="folder for the pictures and sheet.png")
    add("--guidance", type=float, default=5.0, help="1: none; the paper's default is 5")
    add("--steps", type=int, default=30, help="of the solver (Heun: 2 N - 1 network evaluations)")
    add("--solver", choices=["heun", "euler"], default="heun", help="euler: N evaluations, coarser")
    add("--seed", type=int, default=0, help="picture i is a function of (seed, i)")
    add("--batch-size", type=int, default=16)
    add("--device", default="", help="e.g. cuda or cpu; default: a GPU where there is one")
    return parser


class Progress:
    """A bar on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._bar = None

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            if self._bar is None:
                from rich.console import Console
                from rich.progress import Progress as Bar

                self._bar = Bar(console=Console(stderr=True), auto_refresh=False)
                self._bar.start()
                self._task = self._bar.add_task("painting", total=total)
            self._bar.update(self._task, completed=done, refresh=True)
        elif time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            print(f"painting {done}/{total} steps", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:NAME_CHARACTERS].strip("-") or "picture"


if __name__ == "__main__":
    sys.exit(main())

"""Pictures from prompts: `python -m training.generate --checkpoint RUN --prompts … --out DIR`.

A checkpoint alone is enough: its passport names the VAE and the text encoder, and how captions are
attended. Writes one PNG a prompt and sheet.png with all of them.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import program
from pipeline.core.errors import SettingError
from pipeline.core.location import located
from pipeline.core.version import version_line
from training import ranks
from training.checkpoint import weights_metadata
from training.config.sampling_options import check, device_of, read_prompts
from training.threads import share_cores

if TYPE_CHECKING:
    import numpy as np
    import torch

    from training.objectives.sampler import Solver

NAME_CHARACTERS = 60  # of a prompt in its picture's file name

Report = Callable[[int, int], None]
"""Called with (done, total)."""


class Painter:
    """A network with its VAE and text encoder, ready to paint.

    Args:
        checkpoint: a run's folder, or a safetensors file with a passport.
        device: where the network runs, e.g. "cuda"; default: a GPU where there is one.

    Raises:
        SettingError: no such checkpoint or device, or encoders that are not those it was trained
            with.
    """

    def __init__(self, checkpoint: str, device: str = "") -> None:
        from pipeline.core.manifest import mismatches
        from pipeline.encoders import load_text, load_vae
        from training.checkpoint import weights

        path = weights.find(checkpoint)
        self.device = device_of(device)
        self.network, self.passport = weights.load(path, str(self.device))
        self.vae = load_vae(self.passport.vae.name)
        self.text = load_text(self.passport.text_encoder.name)
        for kind, expected, found in (
            ("vae", self.passport.vae, self.vae.facts),
            ("text encoder", self.passport.text_encoder, self.text.facts),
        ):
            # What was imported knows its encoders from the table, which has no hashes.
            unread = () if expected.weights_sha256 else ("weights_sha256",)
            lines = mismatches(expected, found, ignore=("revision", "dtype", *unread))
            if lines:
                raise SettingError(
                    f"{path}: {kind} {expected.name} has changed: {'; '.join(lines)}"
                )

    def paint(
        self,
        prompts: Sequence[str],
        guidance: float = 5.0,
        steps: int = 30,
        seed: int = 0,
        batch_size: int = 16,
        report: Report | None = None,
        solver: Solver = "heun",
    ) -> np.ndarray:
        """One picture a prompt, uint8 (N, H, W, 3).

        Picture i is a function of (seed, i, its prompt), whatever else is asked for.

        Raises:
            SettingError: latents that are no numbers, or a batch that does not fit into memory.
        """
        import numpy as np
        import torch

        from pipeline.core.latents import to_raw
        from training.objectives.sampler import sample

        pictures = []
        batches = [
            range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)
        ]
        for number, indexes in enumerate(batches):
            y, y_mask = self.read([prompts[i] for i in indexes])

            def progress(done: int, _: int, before: int = number * steps) -> None:
                if report is not None:
                    report(before + done, len(batches) * steps)

            bf16 = self.device.type == "cuda"
            try:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    latents = sample(
                        self.network,
                        self.passport.noise(),
                        self._noise(seed, indexes),
                        y,
                        y_mask,
                        steps=steps,
                        guidance=guidance,
                        progress=progress,
                        solver=solver,
                    )
            except torch.OutOfMemoryError as error:
                raise SettingError(
                    f"--batch-size {batch_size}: {len(indexes)} pictures at once do not fit into "
                    f"the memory of {self.device}; give less"
                ) from error
            if not latents.isfinite().all():
                raise SettingError(
                    f"--guidance {guidance:g}: the latents of pictures {indexes[0]} to "
                    f"{indexes[-1]} are no numbers; lower it, or take other weights"
                )
            pictures.append(self.vae.decode(to_raw(latents, self.passport.vae)))
        return np.concatenate(pictures)

    def read(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Captions as training saw them: y (B, L, W), and in a trimmed model their mask (B, L)."""
        import torch

        tokens, lengths = self.text.encode(prompts)
        tokens = tokens.half().float()  # shards store float16
        if self.passport.text == "full":
            return tokens.to(self.device), None
        lengths = torch.as_tensor(lengths)
        tokens = tokens[:, : int(lengths.max())]
        y_mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        return (tokens * y_mask[..., None]).to(self.device), y_mask.to(self.device)

    def _noise(self, seed: int, indexes: Sequence[int]) -> torch.Tensor:
        from training.randomness import picture_noise

        config = self.network.config
        shape = (config.in_channels, config.input_size, config.input_size)
        return picture_noise(seed, indexes, shape).to(self.device)


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
        weights_metadata.read_passport(weights_metadata.find(options.checkpoint))
        painter = Painter(options.checkpoint, options.device)
        report = Progress()
        try:
            pictures = painter.paint(
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
        sheet = write(Path(options.out), prompts, pictures, painter.passport, vars(options))
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
    passport: Any,
    options: dict[str, Any],
) -> Path:
    """One PNG a prompt, with what made it in its text fields, and the contact sheet; its path."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from training.observe.image_grid import contact_sheet

    out.mkdir(parents=True, exist_ok=True)
    footer = "; ".join(passport.attribution)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        info = PngInfo()
        info.add_itxt("prompt", prompt)
        for name in ("guidance", "steps", "seed", "solver"):
            info.add_text(name, str(options[name]))
        info.add_text("index", str(index))
        info.add_text("model", f"{passport.run}, stage {passport.stage}, step {passport.step}")
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

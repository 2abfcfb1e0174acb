"""Checkpoints in and out: `python -m training.convert import FILE.pt`, `… export RUN --to …`.

`import` makes of a file of the official code (released, or of its trainer) one that `init_from` and
`training.generate` take. `export` writes the weights of a run or file as one safetensors, as a file
for the official code, or as a folder that diffusers turns into pictures without this package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core import program
from pipeline.core.errors import SettingError
from pipeline.core.location import located
from pipeline.core.version import version_line
from training import ranks
from training.config.sampling_options import local, require_folder

FORMATS = ("safetensors", "official", "diffusers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where the disk fails, or 2 after a line that says what to change."""
    program.begin()
    ranks.alone()
    options = _parser().parse_args(arguments)
    try:
        if options.command == "import":
            from training.checkpoint.official_import import import_file

            print(
                import_file(
                    Path(options.file),
                    local("--out", options.out or str(Path(options.file).with_suffix(""))),
                    options.arch,
                    options.vae,
                    options.text_encoder,
                )
            )
        else:
            print(export(options))
    except SettingError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"convert: cannot write {options.out or options.file}: {error}", file=sys.stderr)
        return 1
    return 0


def export(options: argparse.Namespace) -> str:
    """Writes the wanted form; what to tell the user."""
    from training.weights import official, weights_file

    path, out = weights_file.find(options.checkpoint), local("--out", options.out)
    if options.to == "diffusers":
        from training.export.folder import write

        write(path, out)
        return (
            f"{out}: DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, "
            "trust_remote_code=True)"
        )
    suffix = {"safetensors": ".safetensors", "official": ".pt"}[options.to]
    if out.is_dir() or out.suffix != suffix:
        raise SettingError(f"--out {out}: give a file that ends in {suffix}")
    require_folder("--out", out.parent)
    tensors, metadata = weights_file.read(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    if options.to == "safetensors":
        weights_file.write(out, tensors, metadata)
        return f"{out}: {len(tensors)} tensors"
    official.write(out, tensors, metadata.network())
    return f"{out}: {len(tensors)} tensors{official.shift_note(metadata.vae)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.convert", description="Checkpoints in and out."
    )
    parser.add_argument("--version", action="version", version=version_line())
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="a checkpoint of the official code").add_argument
    add(
        "file",
        type=located,
        help=".pt or .safetensors; tensors are read, no code of the file is run",
    )
    add(
        "--out",
        default="",
        type=located,
        help="folder for model.safetensors; default: FILE without its ending",
    )
    add(
        "--arch",
        default="",
        type=located,
        help="a network's name, or a YAML with model:; default: by shapes",
    )
    add("--vae", default="", type=located, help="default: sdxl for 4 channels, ostris16 for 16")
    add("--text-encoder", default="dfn5b-h14", type=located)
    add = commands.add_parser("export", help="weights of a run or file").add_argument
    add("checkpoint", type=located, help="a run's folder, or a .safetensors file of one")
    add("--to", required=True, choices=FORMATS)
    add("--out", required=True, type=located, help="file, or for diffusers folder, to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`pipeline`: the command line. Imports what is heavy where it is used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import cli_run
from pipeline.core.errors import SettingError, StorageError, nearest
from pipeline.typer_group import OPTIONS

app = typer.Typer(
    help="From a dataset's name to cached latents in MDS shards.", add_completion=False, **OPTIONS
)
app.add_typer(cli_run.app, name="run")

Source = Annotated[
    str | None, typer.Option(help="Source name; default: every source under the root.")
]
Root = Annotated[
    str | None, typer.Option(help="Data root, a path or URL; default $MICRODIT_ROOT or ./data.")
]
Config = Annotated[
    Path | None, typer.Option(help="Data YAML; default yamls/data/SOURCE.yaml where it exists.")
]


@app.command()
def status(
    root: Root = None,
    source: Source = None,
    config: Config = None,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """What is done, left, stale and failing, by source and group."""
    from pipeline.config import default_root
    from pipeline.status import as_json, collect, show

    rows = collect(root or default_root(), source, config)
    print(as_json(rows)) if json_ else show(rows)


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="A VAE or text encoder, e.g. sdxl.")]) -> None:
    """Download an encoder's weights from the Hugging Face hub into the local cache."""
    from pipeline.encoders import TEXT_ENCODERS, VAES, locate_text, locate_vae
    from pipeline.encoders.hub import fetch as fetch_repo

    if name in VAES or (name not in TEXT_ENCODERS and name.count("/") == 1):
        repo, subfolder = locate_vae(name)
    elif name in TEXT_ENCODERS:
        repo, subfolder = locate_text(name).split(":", 1)[1], ""
    else:
        known = {**VAES, **TEXT_ENCODERS}
        raise SettingError(
            f"fetch {name}: unknown{nearest(name, known)}; known: {', '.join(known)}"
        )
    if Path(repo).is_dir():
        print(f"{name} ships with the package: {repo}")
        return
    print(f"{name}: {fetch_repo(repo, subfolder)}")


def main() -> None:
    """Entry point: errors that a person can mend are one line; README lists the exit codes."""
    try:
        code = app(standalone_mode=False)
    except SettingError as error:
        code = _complain(str(error))
    except StorageError as error:
        code = _complain(str(error), 1)
    except typer.TyperException as error:
        ctx = getattr(error, "ctx", None)
        hint = f" (see `{ctx.command_path} --help`)" if ctx else ""
        code = _complain(f"{getattr(error, 'format_message', error.__str__)()}{hint}")
    except (KeyboardInterrupt, typer.Abort):
        code = _complain("interrupted; the same command goes on where it stopped", 130)
    sys.exit(code or 0)


def _complain(message: str, code: int = 2) -> int:
    print(f"pipeline: {' '.join(message.split())}", file=sys.stderr)
    return code

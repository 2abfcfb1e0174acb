"""`pipeline run|status|fetch`: the command line. Imports what is heavy where it is used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from pipeline.core.errors import SettingError, nearest

if TYPE_CHECKING:
    from pipeline.config import DataConfig


class Commands(typer.core.TyperGroup):
    """A group that answers a mistyped command with the nearest one."""

    def resolve_command(self, ctx, args):
        if args and args[0] not in self.commands:
            raise SettingError(
                f"unknown command {args[0]!r}{nearest(args[0], self.commands)}; "
                f"known: {', '.join(self.commands)} (see `{ctx.command_path} --help`)"
            )
        return super().resolve_command(ctx, args)


_OPTIONS: dict[str, Any] = {"cls": Commands, "no_args_is_help": True, "rich_markup_mode": None}
app = typer.Typer(
    help="From a dataset's name to cached latents in MDS shards.", add_completion=False, **_OPTIONS
)
run_app = typer.Typer(help="Run a stage over the shards it has left to do.", **_OPTIONS)
app.add_typer(run_app, name="run")

Source = Annotated[
    str | None, typer.Option(help="Source name; default: every source under the root.")
]
Root = Annotated[
    str | None, typer.Option(help="Data root, a path or URL; default $MICRODIT_ROOT or ./data.")
]
Config = Annotated[
    Path | None, typer.Option(help="Data YAML; default yamls/data/SOURCE.yaml where it exists.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes; default: all CPUs.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to use, e.g. auto; its token comes from $RAY_AUTH_TOKEN[_PATH]."
    ),
]
Stale = Annotated[bool, typer.Option("--stale", help="Also redo shards whose inputs changed.")]
Vae = Annotated[str | None, typer.Option(help="sdxl, ostris16, tiny4, tiny16, a folder or hub id.")]
TextEncoder = Annotated[
    str | None, typer.Option(help="dfn5b-h14, tiny-clip, a folder or a hub id of open_clip.")
]
Resolutions = Annotated[str | None, typer.Option(help="Sides in pixels, e.g. 256,512.")]
Captions = Annotated[
    str | None, typer.Option(help="alt (the source's own), a captioner, or alt:0.9,colour:0.1.")
]
Text = Annotated[str | None, typer.Option(help="full (padding kept) or trimmed (real tokens).")]


@run_app.command()
def download(
    source: Annotated[str | None, typer.Option(help="Source name.")] = None,
    root: Root = None,
    config: Config = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A source's own setting, KEY=VALUE.")
    ] = None,
    workers: Workers = None,
    address: Address = None,
    stale: Stale = False,
) -> None:
    """Fetch pictures and captions into WebDataset tars."""
    if source is None and config is None:
        raise SettingError("--source: name the source to download, e.g. --source openmoji")
    overrides: dict[str, Any] = {}
    for item in set_ or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise SettingError(f"--set {item}: write KEY=VALUE")
        overrides[f"download.{key}"] = value
    _run(["download"], source, root, config, overrides, workers, address, stale)


@run_app.command()
def caption(
    source: Source = None,
    root: Root = None,
    config: Config = None,
    captioner: Annotated[str | None, typer.Option(help="Who writes the captions: colour.")] = None,
    workers: Workers = None,
    address: Address = None,
    stale: Stale = False,
) -> None:
    """Write captions beside downloaded shards."""
    overrides = {"caption.captioner": captioner}
    _run(["caption"], source, root, config, overrides, workers, address, stale)


@run_app.command()
def encode(
    source: Source = None,
    root: Root = None,
    config: Config = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    resolutions: Resolutions = None,
    captions: Captions = None,
    text: Text = None,
    workers: Workers = None,
    address: Address = None,
    stale: Stale = False,
) -> None:
    """Encode pictures to latents and captions to token vectors, as MDS shards."""
    overrides = {
        "encode.vae": vae,
        "encode.text_encoder": text_encoder,
        "encode.resolutions": None if resolutions is None else resolutions.split(","),
        "encode.captions": captions,
        "encode.text": text,
    }
    _run(["encode"], source, root, config, overrides, workers, address, stale)


@run_app.command("all")
def all_(
    source: Source = None,
    root: Root = None,
    config: Config = None,
    workers: Workers = None,
    address: Address = None,
    stale: Stale = False,
) -> None:
    """Download, caption and encode one source, as its YAML says."""
    if source is None and config is None:
        raise SettingError("run all: name --source or --config, e.g. yamls/data/openmoji.yaml")
    stages = ["download", "caption", "encode"]
    _run(stages, source, root, config, {}, workers, address, stale)


@app.command()
def status(
    root: Root = None,
    source: Source = None,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """What is committed under a root, by source and group."""
    from pipeline.config import default_root
    from pipeline.status import as_json, collect, show

    rows = collect(root or default_root(), source)
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


def _run(
    stages: list[str],
    source: str | None,
    root: str | None,
    config: Path | None,
    overrides: dict[str, Any],
    workers: int | None,
    address: str | None,
    stale: bool,
) -> None:
    from pipeline.config import default_root, load_config

    root = root or default_root()
    sources: list[str | None] = [source]
    if source is None and config is None:
        sources = [*_sources_under(root)]
    configs = [load_config(name, config, overrides) for name in sources]
    failed = False
    for record in configs:
        for stage in stages:
            failed |= _run_stage(stage, record, root, workers, address, stale)
    if failed:
        raise typer.Exit(1)


def _run_stage(
    name: str,
    config: DataConfig,
    root: str,
    workers: int | None,
    address: str | None,
    stale: bool,
) -> bool:
    """Runs one stage of one source and prints its summary; whether the run failed."""
    from pipeline.config import build_stage
    from pipeline.progress import Progress, summarise
    from pipeline.runner import run

    stage = build_stage(name, config)
    with Progress(f"{name} {config.source}") as progress:
        report = run(stage, root, workers, address, stale, progress)
    summarise(config.source, report)
    return bool(report.failed) or report.fruitless


def _sources_under(root: str) -> list[str]:
    from pipeline.core.store import Store
    from pipeline.sources import SOURCES

    found = [name for name in Store(root).folders("") if name in SOURCES]
    if not found:
        raise SettingError(
            f"--root {root}: no source has been downloaded there; "
            "start with `pipeline run download --source openmoji`"
        )
    return found


def main() -> None:
    """Entry point: errors that a person can mend are one line and exit 2."""
    try:
        code = app(standalone_mode=False)
    except SettingError as error:
        code = _complain(str(error))
    except typer.TyperException as error:
        ctx = getattr(error, "ctx", None)
        hint = f" (see `{ctx.command_path} --help`)" if ctx else ""
        code = _complain(f"{getattr(error, 'format_message', error.__str__)()}{hint}")
    except PermissionError as error:
        code = _complain(f"{error.filename}: permission denied", 1)
    except (KeyboardInterrupt, typer.Abort):
        code = _complain("interrupted; the same command goes on where it stopped", 130)
    sys.exit(code or 0)


def _complain(message: str, code: int = 2) -> int:
    print(f"pipeline: {' '.join(message.split())}", file=sys.stderr)
    return code

"""`pipeline convert export|import`: the official code's layout. Imports what is heavy on use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.run import Common, run_stage, with_common
from pipeline.commands.typer_group import OPTIONS, path_option
from pipeline.core.errors import SettingError

if TYPE_CHECKING:
    from pipeline.config import EncodeConfig
    from pipeline.core.stage import Stage

app = typer.Typer(
    help="The official MicroDiT code's single MDS: write it, read it. No encoder runs.", **OPTIONS
)

Vae = Annotated[
    str | None,
    typer.Option(help="The VAE that made the latents, e.g. sdxl.", callback=path_option),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="The text encoder that made the vectors, e.g. dfn5b-h14.", callback=path_option
    ),
]
Resolutions = Annotated[str | None, typer.Option(help="Sides in pixels, e.g. 256,512.")]


def _export(common: Common, given: dict[str, Any]) -> None:
    from pipeline.config import default_root
    from pipeline.core.catalog import Catalog
    from pipeline.core.store import Store
    from pipeline.official.exporter import Export
    from pipeline.official.groups import ExportSettings

    source = _named(common, "export")
    root = common.root or default_root()
    own = {key: given.pop(key) for key in ("out", "split", "dequantise")}
    config = _encode_config(common, source, given)
    settings = ExportSettings(
        vae=config.vae,
        text_encoder=config.text_encoder,
        resolutions=tuple(config.resolutions),
        captions=config.captions,
        latents=config.latents,
        crop=config.crop,
        split=own["split"],
        name=own["out"],
        dequantise=own["dequantise"],
    )
    store = Store(root)
    stage = Export(store, source, settings, _rate(common))
    for line in stage.notes(Catalog(store)):
        print(f"export {source}: {line}", file=sys.stderr)
    _finish(stage, root, common)
    if not common.dry_run:
        print(f"{store.url(stage.group)}: give this folder to the official trainer")


def _import(common: Common, given: dict[str, Any]) -> None:
    from pipeline.config import default_root
    from pipeline.official.importer import Import, ImportSettings

    if common.config is not None:
        raise SettingError("convert import: takes no --config; name the encoders with options")
    source = _named(common, "import")
    for name in ("dataset", "vae", "text_encoder"):
        if given[name] is None:
            option = "from" if name == "dataset" else name.replace("_", "-")
            raise SettingError(f"convert import: --{option} is missing; the dataset cannot tell it")
    settings = ImportSettings(**{**given, "resolutions": tuple(_sides(given["resolutions"]))})
    stage = Import(source, settings, _rate(common))
    _finish(stage, common.root or default_root(), common)


@app.command()
@lambda own: with_common(own, _export)
def export(
    out: Annotated[
        str,
        typer.Option(help="Its name below SOURCE/official; default mds_latents_VAE_TEXTENCODER."),
    ] = "",
    vae: Vae = None,
    text_encoder: Text = None,
    captions: Annotated[str | None, typer.Option(help="alt, a captioner, or a mix.")] = None,
    resolutions: Resolutions = None,
    latents: Annotated[
        str | None, typer.Option(help="Kind of the groups: mean, sample, or moments (their mean).")
    ] = None,
    crop: Annotated[str | None, typer.Option(help="Of the groups: center, random or none.")] = None,
    split: Annotated[
        str, typer.Option(help="One split: the official loader streams all that it finds.")
    ] = "train",
    dequantise: Annotated[
        bool, typer.Option("--dequantise", help="Take int8 token vectors, which are not exact.")
    ] = False,
) -> dict[str, Any]:
    """Join latents and full text into the official single MDS.

    What is not said comes from the source's YAML, as for `pipeline run encode`.
    """
    return {
        "out": out,
        "split": split,
        "dequantise": dequantise,
        "vae": vae,
        "text_encoder": text_encoder,
        "captions": captions,
        "resolutions": None if resolutions is None else resolutions.split(","),
        "latents": latents,
        "crop": crop,
    }


@app.command("import")
@lambda own: with_common(own, _import)
def import_(
    dataset: Annotated[
        str | None,
        typer.Option("--from", help="The official dataset: folder or URL.", callback=path_option),
    ] = None,
    vae: Vae = None,
    text_encoder: Text = None,
    captions: Annotated[str, typer.Option(help="The name to give to its captions.")] = "alt",
    resolutions: Resolutions = None,
    latents: Annotated[
        str, typer.Option(help="sample, as the official code stores, or mean.")
    ] = "sample",
    split: Annotated[str, typer.Option(help="The split that its samples are of.")] = "train",
) -> dict[str, Any]:
    """Read an official single MDS into column groups of a source of any name."""
    return {
        "dataset": dataset,
        "vae": vae,
        "text_encoder": text_encoder,
        "captions": captions,
        "resolutions": resolutions,
        "latents": latents,
        "split": split,
    }


def _finish(stage: Stage, root: str, common: Common) -> None:
    report = run_stage(stage, root, common)
    if report is not None and report.failed:
        raise typer.Exit(1)


def _encode_config(common: Common, source: str, given: dict[str, Any]) -> EncodeConfig:
    """What the source's YAML says of encode, where it has one, and the options."""
    from pipeline.config import check_names, load_config

    overrides = {f"encode.{key}": value for key, value in given.items()}
    check_names(overrides)
    return load_config(source, common.config, overrides).encode


def _rate(common: Common) -> float:
    from pipeline.core.commits import MAX_REJECT_RATE

    return MAX_REJECT_RATE if common.max_reject_rate is None else common.max_reject_rate


def _named(common: Common, command: str) -> str:
    if common.source is None:
        raise SettingError(f"convert {command}: name the source with --source")
    if "/" in common.source or common.source.startswith("."):
        raise SettingError(f"--source {common.source}: a source is one folder below the root")
    return common.source


def _sides(text: str | None) -> list[int]:
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise SettingError(f"--resolutions {text}: write sides in pixels, e.g. 256,512")
    return [int(part) for part in parts]

"""`pipeline run download|caption|encode|all`. Imports what is heavy where it is used."""

from __future__ import annotations

import functools
import inspect
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.typer_group import OPTIONS, path_option
from pipeline.core.errors import SettingError

if TYPE_CHECKING:
    from pipeline.core.stage import Stage
    from pipeline.engine.report import Report

app = typer.Typer(help="Run a stage over the shards it has left to do.", **OPTIONS)

Device = Annotated[
    str | None, typer.Option(help="Where models run: cpu, or cuda: each worker holds one GPU.")
]
STOPPED = {"SIGTERM": 143, "SIGINT": 130}  # exit codes, as a shell gives them


@dataclass(frozen=True)
class Common:
    """The options that every stage takes: which shards, where, and how. None decides a byte."""

    source: Annotated[
        str | None, typer.Option(help="Source name; default: every source under the root.")
    ] = None
    root: Annotated[
        str | None,
        typer.Option(
            help="Data root, a path or URL; default $MICRODIT_ROOT or ./data.",
            callback=path_option,
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            help="Data YAML; default yamls/data/SOURCE.yaml, or the package's.",
            callback=path_option,
        ),
    ] = None
    shards: Annotated[
        str, typer.Option(help="Only these input shards, e.g. 00000-00031,00100.")
    ] = ""
    fraction: Annotated[
        float | None,
        typer.Option(help="Only this share of the input shards, e.g. 0.01, chosen by hash."),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(help="Only the first input shards, whole, to about this many pictures."),
    ] = None
    stale: Annotated[
        bool, typer.Option("--stale", help="Also redo those whose inputs changed.")
    ] = False
    force: Annotated[
        bool, typer.Option("--force", help="Redo them all, made or not; old files stay.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what there is to do and what it needs; do none.")
    ] = False
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; default: all CPUs (or GPUs).")
    ] = None
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster to use, e.g. auto; its token comes from $RAY_AUTH_TOKEN[_PATH]."
        ),
    ] = None
    join: Annotated[
        bool, typer.Option("--join", help="Work beside another run of the same stage.")
    ] = False
    quota: Annotated[
        str | None, typer.Option(help="What the root may hold, e.g. 7TB; refuse to exceed it.")
    ] = None
    max_reject_rate: Annotated[
        float | None,
        typer.Option(help="Do not commit a shard with a larger share of rejects; default 0.9."),
    ] = None
    shard_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a shard is tried again.")
    ] = None
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Ray's dashboard, on a private cluster.")
    ] = False


def _stage_command(own: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """A command with its own options, which `own` turns into overrides, and the common ones."""

    def run_them(common: Common, overrides: dict[str, Any]) -> None:
        stages = ["download", "caption", "encode"] if own.__name__ == "all_" else [own.__name__]
        _run(stages, common, overrides)

    return with_common(own, run_them)


def with_common(
    own: Callable[..., Any], finish: Callable[[Common, Any], None]
) -> Callable[..., None]:
    """A command with its own options and the common ones; what `own` makes of its own goes to
    `finish`."""

    @functools.wraps(own)
    def command(**given: Any) -> None:
        common = Common(**{f.name: given.pop(f.name) for f in fields(Common)})
        finish(common, own(**given))

    signature = inspect.signature(own, eval_str=True)
    shared = [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=annotation
        )
        for f, annotation in zip(fields(Common), _annotations(), strict=True)
    ]
    mine = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in signature.parameters.values()
    ]
    command.__signature__ = inspect.Signature(shared[:3] + mine + shared[3:])  # pyright: ignore
    command.__annotations__ = {p.name: p.annotation for p in shared + mine}
    return command


def _annotations() -> list[Any]:
    return list(inspect.get_annotations(Common, eval_str=True).values())


@app.command()
@_stage_command
def download(
    kind: Annotated[
        str | None,
        typer.Option(help="What the source is, e.g. folder, where --source is a name of yours."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A source's own setting, KEY=VALUE; `pipeline sources NAME` lists them.",
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(help="Shrink a larger shorter side to this, pixels; none shrinks none."),
    ] = None,
    min_image_size: Annotated[
        int | None, typer.Option(help="Reject pictures whose shorter side is smaller, pixels.")
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Fetch again what failed to download, and only that."),
    ] = False,
    allow_private_hosts: Annotated[
        bool,
        typer.Option(
            "--allow-private-hosts", help="Links may lead into your own network (URL lists)."
        ),
    ] = False,
) -> dict[str, Any]:
    """Fetch pictures and captions into WebDataset tars."""
    overrides: dict[str, Any] = {
        "kind": kind,
        "rules.image_size": image_size,
        "rules.min_image_size": min_image_size,
        "retry_failed": retry_failed,
        "download.allow_private_hosts": allow_private_hosts or None,
    }
    return {**overrides, **_settings("download", set_)}


@app.command()
@_stage_command
def caption(
    captioner: Annotated[
        str | None,
        typer.Option(
            help="colour, llava-1.5-7b, llava-1.6-7b, endpoint, or the folder or hub id of an "
            "image-text-to-text model."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="long, medium, short, several (long,short), or a text of your own."),
    ] = None,
    num_captions: Annotated[
        int | None, typer.Option(help="Captions a picture; default: one for each prompt.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; above it, noise drawn by (seed, key).")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of a caption, at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise at a temperature.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="A number, or auto.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, or auto: by device.")
    ] = None,
    clean: Annotated[
        str | None,
        typer.Option(
            help="Steps, e.g. habits,rules,lower: a model's set phrases, links and codes, capitals."
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Of an endpoint: http://HOST:8000/v1.")] = None,
    model: Annotated[str | None, typer.Option(help="Of an endpoint: the model's name.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Of an endpoint: requests at once, for each worker.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A captioner's further setting, KEY=VALUE.")
    ] = None,
    device: Device = None,
) -> dict[str, Any]:
    """Write captions beside downloaded shards."""
    return {
        "caption.captioner": captioner,
        "caption.prompt": prompt,
        "caption.num_captions": num_captions,
        "caption.temperature": temperature,
        "caption.max_tokens": max_tokens,
        "caption.seed": seed,
        "caption.batch_size": batch_size,
        "caption.dtype": dtype,
        "caption.clean": clean,
        "caption.url": url,
        "caption.model": model,
        "caption.concurrency": concurrency,
        "caption.device": device,
        **_settings("caption", set_),
    }


@app.command()
@_stage_command
def encode(
    vae: Annotated[
        str | None, typer.Option(help="sdxl, ostris16, tiny4, tiny16, a folder or hub id.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="dfn5b-h14, tiny-clip, a folder or a hub id of open_clip.")
    ] = None,
    resolutions: Annotated[str | None, typer.Option(help="Sides in pixels, e.g. 256,512.")] = None,
    captions: Annotated[
        str | None,
        typer.Option(help="alt (the source's own), a captioner, or alt:0.9,colour:0.1."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="full (padding kept) or trimmed (real tokens).")
    ] = None,
    text_dtype: Annotated[
        str | None, typer.Option(help="float16, or int8: half the bytes, cosine 0.9995 or better.")
    ] = None,
    latents: Annotated[
        str | None,
        typer.Option(help="mean, sample (one draw), or moments (drawn anew each epoch)."),
    ] = None,
    crop: Annotated[
        str | None, typer.Option(help="center, random by (seed, key), or none.")
    ] = None,
    small: Annotated[
        str | None, typer.Option(help="Pictures below the resolution: reject, or upscale.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="The VAE computes in float32, bfloat16, or auto: by device.")
    ] = None,
    batch_size: Annotated[str | None, typer.Option(help="A number, or auto.")] = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile the VAE.")
    ] = None,
    device: Device = None,
) -> dict[str, Any]:
    """Encode pictures to latents and captions to token vectors, as MDS shards."""
    return {
        "encode.vae": vae,
        "encode.text_encoder": text_encoder,
        "encode.resolutions": None if resolutions is None else resolutions.split(","),
        "encode.captions": captions,
        "encode.text": text,
        "encode.text_dtype": text_dtype,
        "encode.latents": latents,
        "encode.crop": crop,
        "encode.small": small,
        "encode.dtype": dtype,
        "encode.batch_size": batch_size,
        "encode.compile": compile_,
        "encode.device": device,
    }


@app.command("all")
@_stage_command
def all_(device: Device = None) -> dict[str, Any]:
    """Download, caption and encode one source, as its YAML says."""
    return {"caption.device": device, "encode.device": device}


def _settings(section: str, given: list[str] | None) -> dict[str, Any]:
    """--set KEY=VALUE, as overrides of a section."""
    overrides: dict[str, Any] = {}
    for item in given or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise SettingError(f"--set {item}: write KEY=VALUE")
        overrides[f"{section}.{key}"] = value
    return overrides


def _run(stages: list[str], common: Common, overrides: dict[str, Any]) -> None:
    from pipeline.config import build_stage, check_names, default_root, load_config
    from pipeline.core.store import Store
    from pipeline.engine.inventory import sources_of
    from pipeline.engine.progress import table
    from pipeline.sources import SOURCES

    if stages[0] == "download" and common.source is None and common.config is None:
        raise SettingError(
            f"run {'all' if len(stages) > 1 else stages[0]}: name the source with --source or "
            "--config, e.g. --source openmoji"
        )
    retry_failed = bool(overrides.pop("retry_failed", False))
    check_names(overrides)
    root = common.root or default_root()
    sources: list[str | None] = [common.source]
    if stages[0] != "download" and common.config is None and common.source not in SOURCES:
        sources = [*sources_of(Store(root), common.source)]
    if sys.stderr.isatty():  # weights are hashed before there is a bar
        print(f"run {', '.join(stages)}: reading settings", file=sys.stderr, flush=True)
    overrides = {**overrides, "max_reject_rate": common.max_reject_rate}
    configs = [load_config(name, common.config, overrides) for name in sources]
    reports: list[Report] = []
    for record in configs:
        for stage in stages:
            report = run_stage(build_stage(stage, record, retry_failed), root, common, retry_failed)
            if report is not None:  # else a dry run: the stages after it have no input yet
                reports.append(report)
    if len(reports) > 1:
        table(reports)
    if any(report.failed for report in reports):
        raise typer.Exit(1)


def run_stage(stage: Stage, root: str, common: Common, retry_failed: bool = False) -> Report | None:
    """Runs one stage of one source and prints its summary; None after a dry run.

    Raises:
        typer.Exit: a signal stopped it.
    """
    from pipeline.commands.summary import summarise
    from pipeline.core.catalog import Catalog
    from pipeline.core.store import Store
    from pipeline.engine.plan import Choice, plan, preflight
    from pipeline.engine.pool import Options
    from pipeline.engine.progress import Progress
    from pipeline.engine.runner import run

    quota = None if common.quota is None else parse_size(common.quota)
    choice = Choice(
        shards=common.shards,
        stale=common.stale,
        force=common.force,
        fraction=common.fraction,
        limit=common.limit,
        retry_failed=retry_failed,
    )
    if common.dry_run:
        store = Store(root)
        catalog = Catalog(store, functools.partial(print, file=sys.stderr))
        print(preflight(stage, store, plan(stage, catalog, choice), quota))
        return None
    options = Options(
        workers=common.workers,
        address=common.address,
        choice=choice,
        join=common.join,
        quota=quota,
        shard_timeout_s=common.shard_timeout,
        dashboard=common.dashboard,
        command=shlex.join(["pipeline", *sys.argv[1:]]),
    )
    with Progress(f"{stage.name} {stage.source}") as progress:
        report = run(stage, root, options, progress, progress.announce)
    summarise(report)
    if report.stopped:
        print("stopped; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(STOPPED[report.stopped])
    return report


def parse_size(text: str) -> int:
    """ "7TB", "500 GB", "1000000" in bytes, by powers of 1000."""
    number = text.upper().replace(" ", "").removesuffix("B")
    powers = {"K": 3, "M": 6, "G": 9, "T": 12, "P": 15}
    power = powers.get(number[-1:], 0)
    try:
        value = float(number[:-1] if power else number)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise SettingError(f"--quota {text}: write a size, e.g. 500GB or 7TB")
    return int(value * 10**power)

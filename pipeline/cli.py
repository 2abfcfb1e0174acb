"""`pipeline`: the command line. Imports what is heavy where it is used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands import convert, run
from pipeline.commands.typer_group import OPTIONS, path_option
from pipeline.core import program
from pipeline.core.errors import BrokenShard, SettingError, StorageError, nearest

app = typer.Typer(
    help="From a dataset's name to cached latents in MDS shards.", add_completion=False, **OPTIONS
)
app.add_typer(run.app, name="run")
app.add_typer(convert.app, name="convert")

Source = Annotated[
    str | None, typer.Option(help="Source name; default: every source under the root.")
]
Root = Annotated[
    str | None,
    typer.Option(
        help="Data root, a path or URL; default $MICRODIT_ROOT or ./data.", callback=path_option
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Data YAML; default yamls/data/SOURCE.yaml, or the package's.", callback=path_option
    ),
]


def _version(asked: bool) -> None:
    if asked:
        from pipeline.core.version import version_line

        print(version_line())
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Say which, and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def sources(
    name: Annotated[str | None, typer.Argument(help="Of which to list the settings.")] = None,
) -> None:
    """The kinds of sources, and what `--set KEY=VALUE` takes of one: key, default, meaning."""
    import textwrap

    from pipeline.commands.sources import about, settings
    from pipeline.engine.progress import console
    from pipeline.sources import SOURCES

    width = console().width
    if name is None:
        for kind in SOURCES:
            print(textwrap.shorten(f"{kind}: {about(kind)}", width, placeholder=" …"))
        print("`pipeline sources NAME` lists its settings; docs/download.md has them all.")
        return
    print(textwrap.fill(about(name), width))
    for key, default, meaning in settings(name):
        print(f"\n  --set {key}={'…' if default == 'required' else default}")
        text = f"required. {meaning}" if default == "required" else meaning
        if text:
            indent = " " * 6
            print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent))


@app.command()
def status(
    root: Root = None,
    source: Source = None,
    config: Config = None,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """What is done, left, stale and failing, by source and group."""
    from pipeline.commands.status import as_json, collect, show
    from pipeline.config import default_root

    rows = collect(root or default_root(), source, config)
    print(as_json(rows)) if json_ else show(rows)


@app.command()
def fetch(
    name: Annotated[
        str, typer.Argument(help="A VAE, text encoder or captioner, e.g. sdxl, or a hub id.")
    ],
) -> None:
    """Download a model's weights from the Hugging Face hub into the local cache."""
    from captioning.vlm import hub
    from captioning.vlm.captioner import MODELS
    from pipeline.encoders import TEXT_ENCODERS, VAES, locate_text, locate_vae
    from pipeline.encoders.hub import fetch as fetch_repo
    from pipeline.encoders.hub import hub_errors, is_hub_id

    if name in MODELS:
        with hub_errors(name, MODELS[name]):
            print(f"{name}: {hub.fetch(MODELS[name])}")
        return
    if name in VAES or (name not in TEXT_ENCODERS and is_hub_id(name)):
        repo, subfolder = locate_vae(name)
    elif name in TEXT_ENCODERS:
        repo, subfolder = locate_text(name).split(":", 1)[1], ""
    else:
        known = {**VAES, **TEXT_ENCODERS, **MODELS}
        raise SettingError(
            f"fetch {name}: unknown{nearest(name, known)}; known: {', '.join(known)}"
        )
    if Path(repo).is_dir():
        print(f"{name} ships with the package: {repo}")
        return
    with hub_errors(name, repo):
        print(f"{name}: {fetch_repo(repo, subfolder)}")


@app.command()
def verify(
    root: Root = None,
    source: Source = None,
    group: Annotated[
        str | None, typer.Option(help="Only this group, e.g. latents/sdxl/256.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Put broken shards back to what is left to do, and publish their groups anew. "
            "Deletes their commit records, never a data file.",
        ),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: all CPUs.")
    ] = None,
    dropped: Annotated[
        bool,
        typer.Option(
            "--dropped", help="Only prove that nothing is left of dropped samples: exit 1 if it is."
        ),
    ] = False,
) -> None:
    """Read every committed byte again and say what is wrong: exit 1 if anything is."""
    import contextlib
    import shlex

    from pipeline.commands.checks import Problem
    from pipeline.commands.verify import Summary, as_json, select
    from pipeline.commands.verify import repair as put_back
    from pipeline.commands.verify import verify as check_all
    from pipeline.config import default_root
    from pipeline.core import lease
    from pipeline.core.store import Store, size
    from pipeline.engine.progress import Count

    store = Store(root or default_root())
    if dropped:
        if repair or json_ or group is not None:
            raise SettingError("verify --dropped: takes --root and --source, nothing else")
        from pipeline.commands.drop import verify_dropped

        verify_dropped(store, source)
        return
    groups = select(store, source, group)
    problems: list[Problem] = []
    lines: list[str] = []
    held = contextlib.nullcontext()
    if repair:
        names = [f"{s}/{g}" for s, g in groups]
        command = shlex.join(["pipeline", *sys.argv[1:]])
        held = lease.held(store, names, command, remedy=lease.WAIT)

    def found(problem: Problem) -> None:
        if repair or json_:
            problems.append(problem)
        if not json_:
            print(problem, flush=True)

    with held:
        with Count("verify") as count:

            def progress(done: int, total: int, so_far: Summary) -> None:
                facts = f"{size(so_far.bytes)} · {so_far.problems} problems"
                count(done, total, facts)

            def note(line: str) -> None:
                print(line, file=sys.stderr)

            summary = check_all(store, groups, workers, found, progress, note)
        if repair and problems:
            lines = put_back(store, problems)
    if json_:
        print(as_json(problems, summary, lines))
    else:
        for line in lines:
            print(f"repair: {line}")
        print(
            f"verify: {summary.groups} groups, {summary.shards} shards, {summary.samples} samples, "
            f"{size(summary.bytes)} read, {summary.problems} problems, {summary.seconds:.1f} s"
        )
    if summary.problems:
        raise typer.Exit(1)


@app.command()
def prune(
    root: Root = None,
    source: Source = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete them without being asked.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable, every name.")] = False,
) -> None:
    """List files that no commit names, and delete them with --yes.

    They are what redone shards replaced and what dead runs left. A training that started before a
    shard was redone may still read the file that was replaced: prune when such trainings are over.
    """
    import shlex

    from pipeline.config import default_root
    from pipeline.core import lease
    from pipeline.core.store import Store
    from pipeline.dropping.prune import as_json, common, delete, find, leased, show, total
    from pipeline.engine.inventory import sources_of

    store = Store(root or default_root())
    sources = sources_of(store, source)
    groups = [group for name in sources for group in leased(store, name)]
    lease.refuse_if_held(store, groups, remedy=lease.WAIT)
    garbage = [found for name in sources for found in find(store, name)]
    if not json_:
        print("\n".join(show(garbage)))
    if garbage and not yes and not json_ and sys.stdin.isatty():
        yes = typer.confirm(f"delete {total(garbage)}?", err=True)
    deleted = bool(garbage and yes)
    if deleted:
        command = shlex.join(["pipeline", *sys.argv[1:]])
        groups = [group for group in groups if store.exists(group)]
        with lease.held(store, groups, command, remedy=lease.WAIT):
            # Again, now that no run can begin: one may have come and gone since.
            garbage = common(garbage, [found for name in sources for found in find(store, name)])
            delete(store, garbage)
    if json_:
        print(as_json(garbage, deleted))
    elif deleted:
        print(f"freed: {total(garbage)}")
    elif garbage:
        print("nothing was deleted; --yes deletes them")


@app.command()
def drop(
    keys: Annotated[
        str | None,
        typer.Option(
            help="File with a sample's key in each line; - is stdin.", callback=path_option
        ),
    ] = None,
    urls: Annotated[
        str | None,
        typer.Option(
            help="File with a picture's URL in each line; - is stdin.", callback=path_option
        ),
    ] = None,
    root: Root = None,
    source: Source = None,
    purge: Annotated[
        bool,
        typer.Option(
            "--purge",
            help="Say where dropped samples still lie (groups, pages, lists, superseded files), "
            "and remove them there with --yes.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Purge without being asked.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what a purge would remove; remove nothing.")
    ] = False,
) -> None:
    """Take samples out: training leaves them out from its next start.

    Their bytes go with --purge, from every group of the root, or when `pipeline run all --stale`
    makes shards anew and `pipeline prune` frees what that replaced. A purge that was interrupted
    goes on when it is started again; a training that started before it may still read the files
    that it replaces. Exit 1 if an entry is in no shard; the others are out all the same.
    """
    from pipeline.commands.drop import purge_sources, take_out
    from pipeline.config import default_root
    from pipeline.core.store import Store
    from pipeline.engine.inventory import sources_of

    if (yes or dry_run) and not purge:
        raise SettingError(f"drop {'--yes' if yes else '--dry-run'}: only with --purge")
    if yes and dry_run:
        raise SettingError("drop --purge: give either --yes or --dry-run")
    if (keys is None) == (urls is None) and not (purge and keys is None):
        raise SettingError("drop: give either --keys FILE or --urls FILE, or --purge alone")
    store = Store(root or default_root())
    sources = sources_of(store, source)
    unmatched = 0
    if keys is not None or urls is not None:
        if dry_run:
            raise SettingError("drop --dry-run: of a purge alone, without --keys and --urls")
        unmatched = take_out(store, sources, keys, urls)
    if purge:
        purge_sources(store, sources, yes, dry_run)
    if unmatched:
        raise typer.Exit(1)


@app.command()
def dedup(
    root: Root = None,
    source: Source = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what there is; take nothing out.")
    ] = False,
) -> None:
    """Take out pictures that several shards hold: of equal ones the first stays.

    Sources in the order of their names, or only --source. Duplicates within a shard were rejected
    at download. What `pipeline drop` says of bytes holds here as well.
    """
    from pipeline.commands.dedup import describe, find, take_out
    from pipeline.config import default_root
    from pipeline.core.store import Store
    from pipeline.engine.inventory import sources_of
    from pipeline.engine.progress import Count

    store = Store(root or default_root())
    sources = sources_of(store, source)
    with Count("dedup") as count:
        found = find(store, sources, count)
    if not dry_run:
        take_out(store, found)
    print("\n".join(describe(found, sources, taken=not dry_run)))


def main() -> None:
    """Entry point: errors that a person can mend are one line; README lists the exit codes."""
    program.begin()
    try:
        code = app(standalone_mode=False)
    except SettingError as error:
        code = _complain(str(error))
    except (BrokenShard, StorageError) as error:
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

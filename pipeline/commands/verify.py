"""`pipeline verify`: every committed byte read again, and what spans shards compared.

Shards are checked side by side in processes (`pipeline.commands.checks`); here are their groups'
indexes and manifests, keys that two shards share, and the repair: a broken shard goes back to what
is left to do, by deleting its commit record alone.
"""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.commands.checks import Checked, Problem, Task, check, digests, keys_of
from pipeline.core import drops, facts, layout, process
from pipeline.core.commits import Commit, commit_path, read_commit, reason
from pipeline.core.errors import BrokenShard, NewerSchema, SettingError, nearest
from pipeline.core.groups import mixture, publish
from pipeline.core.limits import usable_cpus
from pipeline.core.manifest import Manifest, read_manifest
from pipeline.core.store import Store, canonical_json
from pipeline.engine.inventory import groups_of, sources_of
from pipeline.engine.processes import Processes

DUPLICATES = 20  # of a group that are named one by one


@dataclass
class Summary:
    """What was read, and how much of it was wrong."""

    groups: int = 0
    shards: int = 0
    samples: int = 0  # over all groups: a picture counts once in each
    bytes: int = 0
    problems: int = 0
    seconds: float = 0.0


def select(store: Store, source: str | None, group: str | None) -> list[tuple[str, str]]:
    """(source, group below it) of what is to be verified.

    Raises:
        SettingError: no such source or group.
    """
    every = [(s, g) for s in sources_of(store, source) for g in groups_of(store, s)]
    if group is None:
        return every
    chosen = [(s, g) for s, g in every if group.strip("/") in (g, f"{s}/{g}")]
    if not chosen:
        known = sorted({g for _, g in every})
        raise SettingError(
            f"group={group}: not under {store.root}{nearest(group, known)}; "
            f"there: {', '.join(known)}"
        )
    return chosen


def verify(
    store: Store,
    groups: list[tuple[str, str]],
    workers: int | None = None,
    found: Callable[[Problem], None] = lambda problem: None,
    progress: Callable[[int, int, Summary], None] = lambda done, total, summary: None,
    note: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Checks every committed shard of the groups.

    Args:
        groups: of `select`.
        workers: processes; default: every CPU. 1 works in this one.
        found: called with each problem.
        progress: called with (shards done, of how many, counts so far).
        note: called with what could not be compared.

    Raises:
        StorageError: the root cannot be read.
        SettingError: something was written by a newer version, or a process died.
    """
    started = time.monotonic()
    summary = Summary(groups=len(groups))
    shards = {
        (s, g): [
            name.removesuffix(".json")
            for name in store.names(f"{s}/{g}/commits")
            if name.endswith(".json")
        ]
        for s, g in groups
    }
    total = sum(map(len, shards.values()))
    count = min(workers or usable_cpus(), max(total, 1))

    def say(problem: Problem) -> None:
        summary.problems += 1
        found(problem)

    with Processes(count) as run:
        for (source, group), names in shards.items():
            manifest, problems = _manifest(store, source, group, bool(names))
            taken_out = drops.read(store, source)
            tasks = (
                Task(store.root, source, group, n, manifest, taken_out.get(n, frozenset()))
                for n in names
            )
            results: dict[str, Checked] = {}
            for result in run(check, tasks):
                results[result.shard] = result
                summary.shards += 1
                summary.samples += result.samples
                summary.bytes += result.bytes
                summary.seconds = time.monotonic() - started
                for problem in result.problems:
                    say(problem)
                progress(summary.shards, total, summary)
            ordered = [results[name] for name in names]
            problems += _duplicates(store, source, group, ordered)
            if _is_written(store, f"{source}/{group}"):
                note(f"{source}/{group}: a run holds it; its index and manifest are not compared")
            elif names:
                problems += _published(store, source, group, manifest, ordered)
            for problem in problems:
                say(problem)
    summary.seconds = time.monotonic() - started
    return summary


def repair(store: Store, problems: list[Problem]) -> list[str]:
    """Puts broken shards back to what is left to do, and publishes their groups anew.

    Deletes commit records and nothing else. The caller holds the groups' leases.

    Returns:
        Lines that say what was done and what is left to the user.
    """
    lines = []
    for source, group in sorted({(p.source, p.group) for p in problems}):
        where = f"{source}/{group}"
        shards = sorted(
            {p.shard for p in problems if (p.source, p.group) == (source, group) and p.shard}
        )
        command = _command(store, source, group)
        for shard in shards:
            store.delete(commit_path(where, shard))
        done = [f"{len(shards)} shards are left to do again"] if shards else []
        mixed = publish(store, where)
        if mixed:
            done.append(f"{mixed}, so its index and manifest stay as they are")
        elif facts.indexed(where):
            done.append("index and manifest were written anew")
        stale = " --stale" if mixed else ""
        again = f"; run again what made it, e.g. {command}{stale}" if shards or mixed else ""
        lines.append(f"{where}: {', '.join(done)}{again}")
    return lines


def _manifest(
    store: Store, source: str, group: str, wanted: bool
) -> tuple[Manifest | None, list[Problem]]:
    """The manifest of a group that training reads; None where it has none, or a broken one."""
    where = f"{source}/{group}"
    if not wanted or not facts.indexed(where):
        return None, []
    try:
        manifest = read_manifest(store, where)
        if manifest.kind == _kind(group):
            return manifest, []
        what = f"is of kind {manifest.kind}"
    except FileNotFoundError:
        what = "is missing"
    except NewerSchema:
        raise
    except SettingError as error:
        what = f"is broken ({reason(error.__cause__ or error)})"
    what = f"manifest.json {what}; `pipeline verify --repair` writes it anew from the commits"
    return None, [Problem(source, group, "", None, what)]


def _published(
    store: Store, source: str, group: str, manifest: Manifest | None, shards: list[Checked]
) -> list[Problem]:
    """index.json and manifest.json against the commits, and these against each other."""
    where = f"{source}/{group}"
    if not facts.indexed(where):
        return []
    found = Counter(shard.facts for shard in shards if shard.facts)
    if mixed := mixture(found):
        # Its index and manifest are those of an older generation, and may well agree.
        text = f"{mixed}; {_command(store, source, group)} --stale makes all of them anew"
        return [Problem(source, group, "", None, text)]
    indexed = [shard for shard in shards if shard.index is not None]
    texts = _index_problems(store, where, indexed)
    if manifest is not None and found:
        stated = facts.of_manifest(manifest)
        made = facts.of_manifest(facts.manifest(where, found, {}))
        lines = facts.clashes(made, stated, rounding=False)
        if lines:
            texts.append(f"manifest.json does not describe its shards ({'; '.join(lines)})")
    if manifest is not None and all(shard.split is not None for shard in shards):
        splits: Counter[str] = Counter()
        for shard in indexed:
            splits[shard.split or ""] += shard.samples
        sums = {"samples": splits.total(), "splits": dict(splits), "shards": len(indexed)}
        for name, expected in sums.items():
            stated = getattr(manifest, name)
            if stated != expected:
                texts.append(f"manifest.json: {name} is {stated}, the commits have {expected}")
    return [Problem(source, group, "", None, text) for text in texts]


def _index_problems(store: Store, group: str, shards: list[Checked]) -> list[str]:
    try:
        index = store.read_json(f"{group}/index.json")
        if index["version"] != 2:
            return [f"index.json has version {index['version']}, not 2"]
        entries = list(map(canonical_json, index["shards"]))
        inputs = list(map(canonical_json, index["inputs"]))
        names = [record["shard"] for record in index["inputs"]]
    except FileNotFoundError:
        return ["index.json is missing"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"index.json is broken ({type(error).__name__}: {error})"]
    if len(entries) != len(inputs):
        return [f"index.json has {len(entries)} shards and {len(inputs)} inputs"]
    expected = {shard.shard: (shard.index, shard.inputs) for shard in shards}
    given = dict(zip(names, zip(entries, inputs, strict=True), strict=True))
    texts = []
    for what, lost in (
        ("lacks {} committed shards", sorted(expected.keys() - given.keys())),
        ("has {} shards that no commit names", sorted(given.keys() - expected.keys())),
        (
            "has {} entries that are not their commits'",
            sorted(n for n in expected.keys() & given.keys() if expected[n] != given[n]),
        ),
    ):
        if lost:
            texts.append(f"index.json {what.format(len(lost))} (first: {lost[0]})")
    if not texts and names != list(expected):
        texts.append("index.json has its shards in another order, or twice")
    return texts


def _duplicates(store: Store, source: str, group: str, shards: list[Checked]) -> list[Problem]:
    """Keys that two shards of a group have: in either of them the sample is in doubt."""
    every = np.concatenate([shard.digests for shard in shards] or [np.empty(0, np.uint64)])
    every.sort()
    twice = np.unique(every[1:][every[1:] == every[:-1]])
    if not len(twice):
        return []
    owners: dict[str, list[str]] = {}
    for shard in shards:
        if np.isin(shard.digests, twice).any():
            for key in _keys(store, f"{source}/{group}", shard.shard):
                if digests([key])[0] in twice[:DUPLICATES]:
                    owners.setdefault(key, []).append(shard.shard)
    problems = [
        Problem(source, group, name, key, f"its key is also in shard {', '.join(others)}")
        for key, names in sorted(owners.items())
        for name in sorted(set(names))
        if (others := sorted(set(names) - {name}))
    ]
    if len(twice) > DUPLICATES:
        more = f"{len(twice)} keys are in several shards; {DUPLICATES} of them are named"
        problems.append(Problem(source, group, "", None, more))
    return problems


def _keys(store: Store, group: str, shard: str) -> list[str]:
    commit = read_commit(store, group, shard)
    try:
        return [] if commit is None else keys_of(store, group, commit)
    except BrokenShard:
        return []  # broken since its check a moment ago; the next run of verify says so


def _is_written(store: Store, group: str) -> bool:
    """Whether a run holds the group, or held it on another host when it died."""
    names = store.names(f"{group}/leases")
    mine = process.identity()
    owners = [name.removesuffix(".json") for name in names]
    return any(owner != mine and not process.is_dead(owner) for owner in owners)


def _kind(group: str) -> str:
    return group.split("/")[0]


#: Settings of captioners that have a flag, where a commit says them.
_CAPTION_FLAGS = (
    *("prompt", "num_captions", "temperature", "max_tokens", "seed"),
    *("batch_size", "device", "dtype", "model"),
)


def _caption_sets(inputs: dict[str, Any]) -> dict[str, Any]:
    """Settings of captioners without a flag, where they are not the default."""
    found = {"tokenizer": inputs.get("tokenizer")}
    if inputs.get("threads") != 1:
        found["threads"] = inputs.get("threads")
    if "model" in inputs:  # an endpoint's: "model", or "model@revision"
        found["revision"] = inputs["revision"].removeprefix(inputs["model"]).removeprefix("@")
    return {name: value for name, value in found.items() if value}


def _command(store: Store, source: str, group: str) -> str:
    """The command that makes the group, as its commits say."""
    inputs: dict[str, Any] = {}
    for name in store.names(f"{source}/{group}/commits")[:10]:
        try:
            commit = read_commit(store, f"{source}/{group}", name.removesuffix(".json"))
        except (ValueError, TypeError, KeyError):
            continue
        if isinstance(commit, Commit):
            inputs = commit.inputs
            break
    kind = _kind(group)
    if inputs.get("stage") in ("export", "import"):
        return _convert_command(store, source, group, inputs)
    stage = {"images": "download", "captions": "caption"}.get(kind, "encode")
    words = ["pipeline", "run", stage, "--root", store.root, "--source", source]
    if kind == "captions" and "captioner" in inputs:
        words += ["--captioner", inputs["captioner"]]
        for name in _CAPTION_FLAGS:
            if inputs.get(name):
                words += [f"--{name.replace('_', '-')}", str(inputs[name])]
        for name, value in _caption_sets(inputs).items():
            words += ["--set", f"{name}={value}"]
        if "clean" in inputs:
            words += ["--clean", ",".join(inputs["clean"])]
    if kind == "latents" and "vae" in inputs:
        words += ["--vae", inputs["vae"]["name"], "--resolutions", str(inputs["resolution"])]
    if kind == "text" and "text_encoder" in inputs:
        weights = inputs["captions"]
        mix = ",".join(f"{name}:{weight:g}" for name, weight in weights.items())
        words += ["--text-encoder", inputs["text_encoder"]["name"], "--text", inputs["text"]]
        mix = mix if len(weights) > 1 else next(iter(weights))
        if group.endswith(f"/{layout.slug(mix)}.{inputs['text']}"):  # else as the YAML says
            words += ["--captions", mix]
    return f"`{shlex.join(words)}`"


def _convert_command(store: Store, source: str, group: str, inputs: dict[str, Any]) -> str:
    stage = inputs["stage"]
    words = ["pipeline", "convert", stage, "--root", store.root, "--source", source]
    words += ["--text-encoder", inputs["text_encoder"]["name"]]
    if "vae" in inputs:
        words += ["--vae", inputs["vae"]["name"]]
    if stage == "export":
        words += ["--resolutions", ",".join(sorted(inputs["latents_made"], key=int))]
        words += ["--latents", inputs["latents"], "--crop", inputs["crop"]]
        words += ["--captions", inputs["captions"], "--split", inputs["split"]]
        words += ["--out", group.split("/")[1]]
    return f"`{shlex.join(words)}{' --from DATASET' if stage == 'import' else ''}`"


def as_json(problems: list[Problem], summary: Summary, lines: list[str]) -> str:
    record = {
        "problems": [vars(problem) for problem in problems],
        "summary": vars(summary),
        "repair": lines,
    }
    return json.dumps(record, indent=1)

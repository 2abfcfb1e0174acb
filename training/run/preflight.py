"""What can be known before anything heavy is imported: facts, sizes, and whether the shards fit.

A run that cannot work says so here, in one line, within two seconds of its start.
"""

from __future__ import annotations

import functools
import itertools
import shlex
from collections.abc import Collection
from typing import TypeVar

from pipeline.core import facts, layout, mix
from pipeline.core.commits import read_commit, remedy
from pipeline.core.errors import SettingError
from pipeline.core.manifest import (
    LatentsManifest,
    Manifest,
    TextManifest,
    mismatches,
    read_manifest,
)
from pipeline.core.mds import stored
from pipeline.core.published import Row, read_index
from pipeline.core.store import Store
from pipeline.encoders import text_facts, vae_facts
from training.config import init_from
from training.config.plan import (
    MissingData,
    TrainingPlan,
    TrainingSource,
    encode_command,
    network_config,
)
from training.config.settings import Config
from training.config.stage_settings import StageSettings
from training.data.left_out import left_out
from training.masking.ratio import ratio_steps
from training.ranks import world_size

UNREAD = ("revision", "weights_sha256", "dtype")  # facts that a table without weights cannot have


M = TypeVar("M", bound=Manifest)


def check(config: Config, need_data: bool = True) -> TrainingPlan:
    """The facts behind a config, or why it cannot run.

    Args:
        need_data: missing shards are an error; otherwise they leave `TrainingPlan.data` empty.

    Raises:
        MissingData: a group or shard file is not there; the message says what makes it.
        SettingError: settings that do not fit each other, or shards made with other settings.
    """
    config = init_from.complete(config)
    plan = TrainingPlan(
        config, vae_facts(config.data.vae), text_facts(config.data.text_encoder), {}
    )
    for name, stage in config.stages.items():
        _check_sizes(plan, name, stage)
    init_from.check(plan, network_config(plan, next(iter(config.stages.values()))))
    try:
        data = _find_data(plan)
    except MissingData:
        if need_data:
            raise
        data = {}
    for name, sources in data.items():
        _check_enough(config, name, sources)
    plan = TrainingPlan(config, plan.vae, plan.text, data)
    init_from.check_encoders(plan)
    return plan


def _check_sizes(plan: TrainingPlan, name: str, stage: StageSettings) -> None:
    unit = plan.vae.downsample * plan.patch_size()
    if stage.resolution % unit:
        raise SettingError(
            f"stages.{name}.resolution={stage.resolution}: must be a multiple of {unit} "
            f"(vae {plan.vae.name} downsamples by {plan.vae.downsample}, "
            f"patch_size {plan.patch_size()})"
        )
    network, scheme = network_config(plan, stage), stage.scheme()
    try:
        scheme.check(network)
        for ratio in ratio_steps(stage.mask_ratio, stage.steps):
            scheme.kept(network.tokens, ratio)
    except ValueError as error:
        raise SettingError(f"stages.{name}: {error}") from error
    if stage.batch_size % world_size():
        raise SettingError(
            f"stages.{name}.batch_size={stage.batch_size}: must be a multiple of the "
            f"{world_size()} ranks"
        )


def _find_data(plan: TrainingPlan) -> dict[str, list[TrainingSource]]:
    config = plan.config
    store = Store(config.data.root)
    found = functools.cache(functools.partial(_find_source, plan, store))
    data = {
        name: [found(source, stage.resolution) for source in config.sources_of(stage)]
        for name, stage in config.stages.items()
    }
    # Sources may have been encoded at different times: the very same weights must have made them.
    every = {s.latents_group: s for sources in data.values() for s in sources}
    for first, source in itertools.combinations(every.values(), 2):
        for kind in ("vae", "text_encoder"):
            a, b = (getattr(s.latents if kind == "vae" else s.text, kind) for s in (first, source))
            differences = mismatches(a, b, ignore=("dtype",))
            if differences:
                raise SettingError(
                    f"data.sources: {first.name} and {source.name} were encoded by different "
                    f"{kind}s ({'; '.join(differences)}); run {source.command(config)} --stale"
                )
    return data


def _find_source(plan: TrainingPlan, store: Store, name: str, resolution: int) -> TrainingSource:
    data = plan.config.data
    command = encode_command(plan.config, name, resolution)
    latents_group = layout.latents_group(name, data.vae, resolution, data.latents, data.crop)
    text_group = layout.text_group(
        name, data.text_encoder, data.captions_of(name), data.text, data.text_dtype
    )
    latents = _manifest(store, latents_group, LatentsManifest, command)
    text = _manifest(store, text_group, TextManifest, command)
    differences = [
        *(f"vae {line}" for line in mismatches(plan.vae, latents.vae, UNREAD)),
        *(f"text encoder {line}" for line in mismatches(plan.text, text.text_encoder, UNREAD)),
        *_differs("resolution", resolution, latents.resolution),
        *_differs("latents", data.latents, latents.latents),
        *_differs("crop", data.crop, latents.crop),
        *_differs("text", data.text, text.text),
        *_differs("text_dtype", data.text_dtype, text.dtype),
        *_differs_in_captions(data.captions_of(name), text.captions),
    ]
    if differences:
        raise SettingError(
            f"{name}: the shards under {store.url(name)} do not fit the YAML "
            f"({'; '.join(differences)}); run {command} --stale, or change the YAML"
        )
    pictures = _shards(plan, store, latents_group, command, _columns(latents))
    captions = _shards(plan, store, text_group, command)
    _check_described(store, latents_group, latents, pictures)
    _check_described(store, text_group, text, captions)
    rows = list(pictures.values())
    gone = left_out(store, name, latents_group, text_group, rows, command)
    empty = {s for s, out in gone.rows.items() if len(out) == pictures[s][0]["samples"]}
    lost = sorted(pictures.keys() - captions.keys() - empty)
    if lost:
        raise MissingData(
            f"{name}: {len(lost)} of {len(pictures)} shards have latents but no captions in "
            f"{store.url(text_group)} (first: {lost[0]}); run {command}"
        )
    if not pictures:
        raise MissingData(
            f"{name}: no shard of split {data.split} in {store.url(latents_group)} "
            f"(splits there: {', '.join(latents.splits) or 'none'})"
        )
    pictures = {shard: row for shard, row in pictures.items() if shard not in empty}
    samples = latent_bytes = 0
    for shard, (entry, _) in pictures.items():
        left = entry["samples"] - len(gone.rows.get(shard, ()))
        samples += left
        latent_bytes += entry["raw_data"]["bytes"] * left // entry["samples"]
    if not samples:
        raise SettingError(
            f"{name}: every sample of split {data.split} was {' or '.join(gone.why())}; "
            "leave it out of data.sources"
        )
    return TrainingSource(
        name,
        latents_group,
        text_group,
        latents,
        text,
        samples=samples,
        latent_bytes=latent_bytes,
        text_bytes=sum(captions[shard][0]["raw_data"]["bytes"] for shard in pictures),
        captions=sum(captions[shard][0]["samples"] for shard in pictures),
        packed=any(entry["compression"] for entry, _ in pictures.values()),
        left_out=gone.why(),
    )


def _manifest(store: Store, group: str, kind: type[M], command: str) -> M:
    try:
        manifest = read_manifest(store, group)
    except FileNotFoundError as error:
        raise MissingData(f"no shards at {store.url(group)}; run {command}") from error
    if not isinstance(manifest, kind):
        raise SettingError(f"{store.url(group)}: its manifest is of kind {manifest.kind}")
    return manifest


def _columns(latents: LatentsManifest) -> tuple[list[str], list[str]]:
    """Names and encodings of the columns of a latents group's shards."""
    shape = ",".join(map(str, latents.shape()))
    return ["key", "latent"], ["str", f"ndarray:float16:{shape}"]


def _shards(
    plan: TrainingPlan,
    store: Store,
    group: str,
    command: str,
    columns: tuple[list[str], list[str]] | None = None,
) -> dict[str, Row]:
    """Input shard -> its part of the group's index, for the wanted split; files are there."""
    data, path = plan.config.data, f"{group}/index.json"
    try:
        index = read_index(store, group)
    except FileNotFoundError as error:
        raise MissingData(f"no index at {store.url(path)}; run {command}") from error
    for entry, record in index:
        if columns and (entry["column_names"], entry["column_encodings"]) != columns:
            raise SettingError(
                f"{store.url(path)}: shard {record['shard']} holds {entry['column_encodings']}, "
                f"by the manifest it would be {columns[1]}; {remedy(store, group)}"
            )
    wanted = {record["shard"]: (e, record) for e, record in index if record["split"] == data.split}
    if store.local and not data.skip_damaged:
        there = set(store.names(group))
        files = [
            [stored(entry)["basename"], *([record["keys"]] if "keys" in record else [])]
            for entry, record in wanted.values()
        ]
        gone = [lost[0] for names in files if (lost := [n for n in names if n not in there])]
        if gone:
            raise MissingData(
                f"{len(gone)} of {len(files)} shard files are missing from {store.url(group)} "
                f"(first: {gone[0]}); copy them there, or run {command}"
            )
    return wanted


def _check_described(store: Store, group: str, manifest: Manifest, shards: Collection[str]) -> None:
    """That a manifest is not of other shards than those beside it: releases before this one wrote
    what the last command said. One commit is asked; `pipeline verify` asks them all.

    Raises:
        SettingError: it is.
    """
    for shard in itertools.islice(shards, 1):
        commit = read_commit(store, group, shard)
        found = "" if commit is None else facts.of(group, commit.inputs)
        if lines := facts.clashes(found, facts.of_manifest(manifest), rounding=False):
            raise SettingError(
                f"{store.url(f'{group}/manifest.json')} does not describe shard {shard} "
                f"({'; '.join(lines)}); run `pipeline verify --root {shlex.quote(store.root)}`"
            )


def _check_enough(config: Config, name: str, sources: list[TrainingSource]) -> None:
    samples, batch = sum(s.samples for s in sources), config.stages[name].batch_size
    if samples < batch:
        raise SettingError(
            f"stages.{name}.batch_size={batch}: the {config.data.split} split has only "
            f"{samples} samples; give at most that"
        )


def _differs_in_captions(expected: str, found: str) -> list[str]:
    return [] if mix.same(expected, found) else _differs("captions", expected, found)


def _differs(name: str, expected: object, found: object) -> list[str]:
    return [] if expected == found else [f"{name}: expected {expected}, found {found}"]

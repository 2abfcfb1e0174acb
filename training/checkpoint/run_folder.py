"""A run's folder: which file is where, and whether it belongs to these settings. No torch here.

    config.json                     the resolved settings of the last start
    <stage>/settings.json           what this stage was begun with
    <stage>/step-00000200.pt        Composer checkpoint; the last one of a finished stage stays
    <stage>/metrics.jsonl           a line a step; see training.observe.metrics_log
    <stage>/loss.png                the finished stage's curves
    <stage>/samples/step-*.png      pictures painted on the way
    <stage>/rollbacks.json          how often the stage went back to a checkpoint, where it did
    <stage>/model.safetensors       averaged weights of the finished stage, with their metadata
    <stage>/ema-NAME.safetensors    further averages of them, e.g. ema-power-0.1
    <stage>/live.safetensors        the weights themselves, where an average was kept
    model.safetensors               of the last finished stage

A stage is finished when its model.safetensors is there, whole: it is written last.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.disk import second_name
from pipeline.core.errors import SettingError
from pipeline.core.store import Store, fingerprint
from training.checkpoint import intact
from training.config import init_from
from training.config.plan import TrainingPlan
from training.config.settings import Config
from training.config.stage_settings import NOISE
from training.network.config import MODELS, DiTConfig
from training.weights import weights_metadata

MODEL = "model.safetensors"
SETTINGS = "settings.json"
ROLLBACKS = "rollbacks.json"
#: Settings of `data` that decide no result of a sound root, or are written in another way.
_NOT_OF_DATA = {
    "root",
    "workers",
    "cache",
    "cache_limit",
    "check_hashes",
    "skip_damaged",
    "sources",
}
_NOT_OF_STAGE = {"save_every", "microbatch", "sources"}
_OF_EVERY_RECORD = {"after", "data", "stage"}  # of whatever version
WEIGHTS_BEFORE = "weights_before"  # in a stage's settings: sha256 of the file it goes on from


@dataclass(frozen=True)
class StageFolder:
    """One stage's part of the run's folder."""

    path: Path

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def live(self) -> Path:
        return self.path / "live.safetensors"

    def average(self, name: str) -> Path:
        return self.path / f"ema-{name}.safetensors"

    @property
    def settings(self) -> Path:
        return self.path / SETTINGS

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curve(self) -> Path:
        return self.path / "loss.png"

    def samples(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:08d}.png"

    def begun(self) -> str | None:
        """Fingerprint of what the stage was begun with; None where that is not recorded."""
        record = self.begun_with()
        return None if record is None else fingerprint(record)

    def begun_with(self) -> dict[str, Any] | None:
        """What the stage was begun with; None where that is not recorded.

        Raises:
            SettingError: the record is damaged.
        """
        if not self.settings.exists():
            return None
        return settings_record(self.settings.read_bytes(), self.settings)

    def rollbacks(self) -> list[dict[str, Any]]:
        """The stage's roll-backs, oldest first; see `add_rollback`.

        Raises:
            SettingError: the record is damaged.
        """
        path = self.path / ROLLBACKS
        if not path.exists():
            return []
        remedy = "remove it: the stage's checkpoint knows how many roll-backs led to it"
        found = intact.record(path.read_bytes(), path, list, remedy)
        if not all(isinstance(r, dict) and isinstance(r.get("to"), int) for r in found):
            raise SettingError(f"{path}: damaged, not a list of roll-backs; {remedy}")
        return found

    def add_rollback(self, step: int, to: int, reason: str) -> None:
        """Records that after `step` the stage goes back to its checkpoint of step `to`.

        Their number is part of the key of all random numbers from there on.
        """
        record = {"step": step, "to": to, "reason": reason}
        Store(self.path).write_json(ROLLBACKS, [*self.rollbacks(), record])

    def finished(self) -> bool:
        return self.model.exists() and not intact.weights_fault(self.model)

    def checkpoint(self, step: int) -> Path:
        return self.path / f"step-{step:08d}.pt"

    def part(self, step: int) -> Path:
        """A checkpoint in the making; Composer reads compression out of other endings than .pt."""
        return self.path / f".step-{step:08d}.part.pt"

    def remove_parts(self) -> list[str]:
        """Deletes what a killed run left half-written; the names of the checkpoints among it."""
        parts = sorted(self.path.glob(".*.part*"))
        for path in parts:
            path.unlink()
        return [path.name.removeprefix(".") for path in parts if path.match(".step-*.part.pt")]

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first; each was whole when it got its name."""
        return sorted(self.path.glob("step-*.pt"))


def stage_folder(plan: TrainingPlan, name: str) -> StageFolder:
    return StageFolder(plan.config.run_folder() / name)


def stage_before(plan: TrainingPlan, name: str) -> StageFolder | None:
    """Of the stage whose weights this one begins with; None for the first."""
    names = list(plan.config.stages)
    place = names.index(name)
    return stage_folder(plan, names[place - 1]) if place else None


def unfinished(plan: TrainingPlan) -> list[str]:
    """The stages that are left to run, in order; of one that is asked for, itself."""
    wanted = [plan.config.stage] if plan.config.stage else plan.config.stages
    return [name for name in wanted if not stage_folder(plan, name).finished()]


def link_last(plan: TrainingPlan) -> None:
    """The run's weights are those of its last finished stage, also where a kill came between."""
    finished = [
        f for f in (stage_folder(plan, name) for name in plan.config.stages) if f.finished()
    ]
    own = plan.config.run_folder() / MODEL
    if finished and not (own.exists() and _same(own, finished[-1].model)):
        link(finished[-1].model, own)


def settings_record(data: bytes, where: object) -> dict[str, Any]:
    """What is in a stage's settings.json.

    Raises:
        SettingError: it is damaged.
    """
    remedy = "put it back, or remove it: checkpoints that were begun with these settings go on"
    found = intact.record(data, where, dict, remedy)
    if not found.keys() >= _OF_EVERY_RECORD:
        raise SettingError(f"{where}: damaged, not what a stage is begun with; {remedy}")
    return found


def check_whole(plan: TrainingPlan, say: Callable[[str], None]) -> None:
    """Looks whether the files that the run goes on from are whole. With `checkpoint.skip_damaged` a
    damaged checkpoint is set aside, and the one before it takes its place.

    Args:
        say: shows a line to the user.

    Raises:
        SettingError: one is damaged; names it and what the run could go on from.
    """
    for name in unfinished(plan):
        folder, before = stage_folder(plan, name), stage_before(plan, name)
        damaged = intact.weights_fault(folder.model) if folder.model.exists() else ""
        while folder.checkpoints() and (fault := intact.checkpoint_fault(folder.checkpoints()[-1])):
            _set_aside(plan, folder.checkpoints(), fault, say)
        if damaged and not folder.checkpoints():
            raise SettingError(
                f"{folder.model}: {damaged}, and no checkpoint of the stage is there to write it "
                f"from; put it back, or remove {folder.path} to train the stage anew"
            )
        if damaged:
            say(f"{folder.model}: {damaged}; written again from {folder.checkpoints()[-1]}")
        if before is not None and before.finished() and not folder.checkpoints():
            steps = plan.config.stages[before.path.name].steps
            last = before.checkpoint(steps)
            fault = intact.checkpoint_fault(last) if last.exists() else ""
            if fault:
                raise SettingError(
                    f"{last}: {fault}, and stage {name} begins with it; put it back, or remove "
                    f"{before.path} to train that stage again"
                )


def _set_aside(
    plan: TrainingPlan, checkpoints: list[Path], fault: str, say: Callable[[str], None]
) -> None:
    path = checkpoints[-1]
    aside = path.with_name(f"{path.name}.damaged")
    way = f"the one before it is {checkpoints[-2]}" if checkpoints[1:] else "none is before it"
    start = "it" if checkpoints[1:] else "the stage's beginning"
    if not plan.config.checkpoint.skip_damaged:
        raise SettingError(
            f"{path}: {fault}; {way}: put a whole copy there, or set checkpoint.skip_damaged=true, "
            f"which renames it to {aside.name} and goes on from {start}"
        )
    os.replace(path, aside)
    say(f"{path}: {fault}; {way}, so the stage goes on from {start}, and this is now {aside.name}")


def check(plan: TrainingPlan) -> None:
    """Refuses to go on with, or to skip, a stage that was begun with other settings, and to go on
    with one whose beginnings, the weights of the stage before, are gone or others.

    Raises:
        SettingError: names the settings, old and new, or the file.
    """
    _check_place(plan.config.run_folder())
    names = list(plan.config.stages)
    asked = plan.config.stage
    before = names[names.index(asked) - 1] if asked and asked != names[0] else None
    if before and not stage_folder(plan, before).finished():
        raise SettingError(
            f"stage={asked}: goes on from stage {before}, which is not finished in "
            f"{plan.config.run_folder()}; run it first"
        )
    records = begun_with(plan)
    for name, begun in records.items():
        found = changes(plan, name, begun, records)
        if found:
            path = stage_folder(plan, name).path
            raise SettingError(
                f"{path} was begun with other settings ({'; '.join(found[:5])}); choose another "
                f"folder (folder=runs/NAME), or remove {path} and the stages after it"
            )
    for first, second in itertools.pairwise(names):
        if asked in ("", second):
            _check_beginnings(stage_folder(plan, first), stage_folder(plan, second))


def _check_place(path: Path) -> None:
    try:
        there = path.exists()
    except OSError as error:  # its name is too long, or a folder above may not be read
        raise SettingError(
            f"folder {path}: {error.strerror}; choose another (folder=runs/NAME)"
        ) from error
    if there and not path.is_dir():
        raise SettingError(f"folder {path}: is a file; choose another (folder=runs/NAME)")


def begun_with(plan: TrainingPlan) -> dict[str, dict[str, Any]]:
    """Stage -> what it was begun with, where that is recorded."""
    records = {name: stage_folder(plan, name).begun_with() for name in plan.config.stages}
    return {name: record for name, record in records.items() if record is not None}


def changes(
    plan: TrainingPlan, name: str, begun: dict[str, Any], records: dict[str, dict[str, Any]]
) -> list[str]:
    """In which settings a stage differs from those that it was begun with, as recorded.

    A setting that is not in the record is newer than the record, and had its default then.

    Args:
        records: of all stages that have one: where the stage before was begun by another version,
            its record has other keys than this version would write.
    """
    now = decisive_settings(plan, name, records)
    if begun.get("after") == decisive_settings(plan, name, {})["after"]:
        now["after"] = begun["after"]
    now["model"] = _sizes(plan.config)
    settings = {key: value for key, value in begun.items() if key != WEIGHTS_BEFORE}
    return differences(settings, now, _stated(plan, name, now))


def begin(plan: TrainingPlan, name: str) -> str:
    """Records what a stage is begun with, unless it goes on from a checkpoint: then that stands.

    Returns:
        The record's fingerprint, by which checkpoints know it.
    """
    store, folder = Store(plan.config.run_folder()), stage_folder(plan, name)
    store.write_json("config.json", plan.config.model_dump(mode="json"))
    if not (folder.checkpoints() and folder.settings.exists()):
        record = decisive_settings(plan, name, begun_with(plan))
        before = stage_before(plan, name)
        if before is not None:
            record[WEIGHTS_BEFORE] = weights_metadata.file_hash(before.model)
        store.write_json(f"{name}/{SETTINGS}", record)
    return folder.begun() or ""


def _check_beginnings(before: StageFolder, folder: StageFolder) -> None:
    if not (folder.finished() or folder.checkpoints()):
        return
    if not before.finished():
        fault = intact.weights_fault(before.model) if before.model.exists() else "it is missing"
        raise SettingError(
            f"{before.model}{fault.removeprefix('it')}, and stage {folder.path.name} began from "
            f"it; put {before.path} back, or remove {folder.path} and the stages after it to "
            "train them anew"
        )
    if folder.finished() or not folder.settings.exists():
        return  # nothing more will come of it
    begun = (folder.begun_with() or {}).get(WEIGHTS_BEFORE)  # older runs have none
    if begun is not None and begun != weights_metadata.file_hash(before.model):
        raise SettingError(
            f"{before.model} holds other weights than those that stage {folder.path.name} began "
            f"from (sha256 {begun[:12]}…); put them back, or remove {folder.path} and the stages "
            "after it to train them anew"
        )


def decisive_settings(
    plan: TrainingPlan, name: str, records: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What decides a stage's result. Not: where data lies, workers, logging, saving, precision, nor
    the guard, which is wanted where a stage that was begun is in trouble.

    Args:
        records: of the stages before; what such a stage would be begun with now where it has none.
    """
    config, stage, source = plan.config, plan.config.stages[name], plan.data[name][0]
    first = name == next(iter(config.stages))
    start = {"init_from": init_from.content_hash(config)} if config.init_from and first else {}
    before, after = stage_before(plan, name), None
    if before is not None:
        own = records.get(before.path.name) or decisive_settings(plan, before.path.name, records)
        own = {key: value for key, value in own.items() if key != WEIGHTS_BEFORE}
        after = f"{before.path.name} {fingerprint(own)}"
    return start | {
        # The stage before, and what decided its result: this one goes on from its weights.
        "after": after,
        "seed": config.seed,
        "precision": "fp64" if config.precision == "fp64" else None,  # moments and averages too
        "base_resolution": config.base_resolution(),
        "objective": config.objective,
        "edm": config.edm.model_dump(mode="json") if config.edm else None,
        "vae": source.latents.vae.model_dump(mode="json"),
        "text_encoder": source.text.text_encoder.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json", exclude_none=True),
        "optimizer": config.optimizer.model_dump(mode="json"),
        # Through JSON, so that it compares with what was written.
        "data": config.data.model_dump(mode="json", exclude=_NOT_OF_DATA)
        | {"sources": config.sources_of(stage)},
        "stage": stage.model_dump(mode="json", exclude=_NOT_OF_STAGE),
    }


def _stated(plan: TrainingPlan, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a stage's decisive settings that are not their defaults."""
    config, stage, source = plan.config, plan.config.stages[name], plan.data[name][0]
    noise, base = NOISE[config.objective], _sizes(config, own=False)
    own = stage.model_dump(mode="json", exclude=_NOT_OF_STAGE, exclude_defaults=True)
    dumped = {
        "edm": config.edm,
        "vae": source.latents.vae,
        "text_encoder": source.text.text_encoder,
        "optimizer": config.optimizer,
        "data": config.data,
    }
    return settings | {
        **{k: v.model_dump(mode="json", exclude_defaults=True) for k, v in dumped.items() if v},
        "model": {k: v for k, v in settings["model"].items() if k == "arch" or v != base.get(k)},
        "stage": {k: v for k, v in own.items() if noise.get(k) != v},
    }


def _sizes(config: Config, own: bool = True) -> dict[str, Any]:
    """Every size that section `model` can state: the architecture's, and on top the run's own."""
    base = dataclasses.asdict(MODELS.get(config.model.arch, DiTConfig()))
    sizes = {key: base[key] for key in type(config.model).model_fields if key in base}
    stated = config.model.model_dump(mode="json", exclude_none=True) if own else {}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in sizes.items()} | stated


def link(target: Path, name: Path) -> None:
    """The same file under a second name, replaced atomically; a copy where links do not work."""
    part = name.with_name(f".{name.name}.part")
    part.unlink(missing_ok=True)
    second_name(target, part)
    os.replace(part, name)


def _same(a: Path, b: Path) -> bool:
    """The same file, or, where links do not work, a copy of its size that is not older."""
    one, other = a.stat(), b.stat()
    copied = one.st_size == other.st_size and one.st_mtime_ns >= other.st_mtime_ns
    return os.path.samestat(one, other) or copied


def differences(old: Any, new: Any, stated: Any, key: str = "") -> list[str]:
    """ "key: old -> new" for everything in which two records of settings differ.

    Args:
        stated: of the new one, what is not at its default. What is, may be missing in the old one.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        known = stated if isinstance(stated, dict) else {}
        return [
            line
            for name in sorted(old.keys() | new.keys())
            if name in old or name in known
            for line in differences(
                old.get(name), new.get(name), known.get(name), f"{key}.{name}".lstrip(".")
            )
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = stated if isinstance(stated, list) and len(stated) == len(new) else new
        if all(not differences(*three) for three in zip(old, new, parts, strict=True)):
            return []
    return [] if old == new else [f"{key}: {old} -> {new}"]

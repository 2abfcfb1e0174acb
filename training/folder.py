"""A run's folder: which file is where, and whether it belongs to these settings. No torch here.

    config.json                     the resolved settings of the last start
    <stage>/settings.json           what this stage was begun with
    <stage>/step-00000200.pt        Composer checkpoint; the last one of a finished stage stays
    <stage>/metrics.jsonl           a line a step; see training.journal
    <stage>/loss.png                the finished stage's curves
    <stage>/samples/step-*.png      pictures painted on the way
    <stage>/rollbacks.json          how often the stage went back to a checkpoint, where it did
    <stage>/model.safetensors       averaged weights of the finished stage, with their passport
    <stage>/ema-NAME.safetensors    further averages of them, e.g. ema-power-0.1
    <stage>/live.safetensors        the weights themselves, where an average was kept
    model.safetensors               of the last finished stage

A stage is finished when its model.safetensors is there: it is written last.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.disk import second_name
from pipeline.core.errors import SettingError
from pipeline.core.store import Store, fingerprint
from training import header, initial
from training.preflight import Plan

MODEL = "model.safetensors"
SETTINGS = "settings.json"
ROLLBACKS = "rollbacks.json"
#: Settings of `data` that decide no result of a sound root, or are written in another way.
FREE = {"root", "workers", "cache", "cache_limit", "check_hashes", "skip_damaged", "sources"}
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
        if not self.settings.exists():
            return None
        return fingerprint(json.loads(self.settings.read_text()))

    def rollbacks(self) -> list[dict[str, Any]]:
        """The stage's roll-backs, oldest first; see `add_rollback`."""
        path = self.path / ROLLBACKS
        return json.loads(path.read_text()) if path.exists() else []

    def add_rollback(self, step: int, to: int, reason: str) -> None:
        """Records that after `step` the stage goes back to its checkpoint of step `to`.

        Their number is part of the key of all random numbers from there on.
        """
        record = {"step": step, "to": to, "reason": reason}
        Store(self.path).write_json(ROLLBACKS, [*self.rollbacks(), record])

    def finished(self) -> bool:
        return self.model.exists()

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
        """Whole checkpoints, oldest first."""
        return sorted(self.path.glob("step-*.pt"))


def stage_folder(plan: Plan, name: str) -> StageFolder:
    return StageFolder(plan.config.run_folder() / name)


def stage_before(plan: Plan, name: str) -> StageFolder | None:
    """Of the stage whose weights this one begins with; None for the first."""
    names = list(plan.config.stages)
    place = names.index(name)
    return stage_folder(plan, names[place - 1]) if place else None


def unfinished(plan: Plan) -> list[str]:
    """The stages that are left to run, in order; of one that is asked for, itself."""
    wanted = [plan.config.stage] if plan.config.stage else plan.config.stages
    return [name for name in wanted if not stage_folder(plan, name).finished()]


def link_last(plan: Plan) -> None:
    """The run's weights are those of its last finished stage, also where a kill came between."""
    finished = [
        f for f in (stage_folder(plan, name) for name in plan.config.stages) if f.finished()
    ]
    own = plan.config.run_folder() / MODEL
    if finished and not (own.exists() and _same(own, finished[-1].model)):
        link(finished[-1].model, own)


def check(plan: Plan) -> None:
    """Refuses to go on with, or to skip, a stage that was begun with other settings, and to go on
    with one whose beginnings, the weights of the stage before, are gone or others.

    Raises:
        SettingError: names the settings, old and new, or the file.
    """
    names = list(plan.config.stages)
    asked = plan.config.stage
    before = names[names.index(asked) - 1] if asked and asked != names[0] else None
    if before and not stage_folder(plan, before).finished():
        raise SettingError(
            f"stage={asked}: goes on from stage {before}, which is not finished in "
            f"{plan.config.run_folder()}; run it first"
        )
    for name in names:
        folder = stage_folder(plan, name)
        if folder.settings.exists():
            found = changes(plan, name, json.loads(folder.settings.read_text()))
            if found:
                raise SettingError(
                    f"{folder.path} was begun with other settings ({'; '.join(found[:5])}); "
                    f"choose another folder (folder=runs/NAME), or remove {folder.path} and the "
                    "stages after it"
                )
    for first, second in itertools.pairwise(names):
        if asked in ("", second):
            _check_beginnings(stage_folder(plan, first), stage_folder(plan, second))


def changes(plan: Plan, name: str, begun: dict[str, Any]) -> list[str]:
    """In which settings a stage differs from those that it was begun with, as recorded."""
    settings = {key: value for key, value in begun.items() if key != WEIGHTS_BEFORE}
    return differences(settings, decisive_settings(plan, name))


def begin(plan: Plan, name: str) -> str:
    """Records what a stage is begun with, unless it goes on from a checkpoint: then that stands.

    Returns:
        The record's fingerprint, by which checkpoints know it.
    """
    store, folder = Store(plan.config.run_folder()), stage_folder(plan, name)
    store.write_json("config.json", plan.config.model_dump(mode="json"))
    if not (folder.checkpoints() and folder.settings.exists()):
        record, before = decisive_settings(plan, name), stage_before(plan, name)
        if before is not None:
            record[WEIGHTS_BEFORE] = header.file_hash(before.model)
        store.write_json(f"{name}/{SETTINGS}", record)
    return folder.begun() or ""


def _check_beginnings(before: StageFolder, folder: StageFolder) -> None:
    if not (folder.finished() or folder.checkpoints()):
        return
    if not before.finished():
        raise SettingError(
            f"{before.model} is missing, and stage {folder.path.name} began from it; put "
            f"{before.path} back, or remove {folder.path} and the stages after it to train them "
            "anew"
        )
    if folder.finished() or not folder.settings.exists():
        return  # nothing more will come of it
    begun = json.loads(folder.settings.read_text()).get(WEIGHTS_BEFORE)  # older runs have none
    if begun is not None and begun != header.file_hash(before.model):
        raise SettingError(
            f"{before.model} holds other weights than those that stage {folder.path.name} began "
            f"from (sha256 {begun[:12]}…); put them back, or remove {folder.path} and the stages "
            "after it to train them anew"
        )


def decisive_settings(plan: Plan, name: str) -> dict[str, Any]:
    """What decides a stage's result. Not: where data lies, workers, logging, saving, precision, nor
    the guard, which is wanted where a stage that was begun is in trouble."""
    config, stage, source = plan.config, plan.config.stages[name], plan.data[name][0]
    # Through JSON, so that it compares with what was written.
    data = config.data.model_dump(mode="json", exclude=FREE)
    own = stage.model_dump(mode="json", exclude={"save_every", "microbatch", "sources"})
    first = name == next(iter(config.stages))
    start = {"init_from": initial.content_hash(config)} if config.init_from and first else {}
    before = stage_before(plan, name)
    after = f"{before.path.name} {_fingerprint(plan, before.path.name)}" if before else None
    return start | {
        # The stage before, and what decided its result: this one goes on from its weights.
        "after": after,
        "seed": config.seed,
        "precision": "fp64" if config.precision == "fp64" else None,  # moments and averages too
        "data": data | {"sources": config.sources_of(stage)},
        "vae": source.latents.vae.model_dump(mode="json"),
        "text_encoder": source.text.text_encoder.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json", exclude_none=True),
        "base_resolution": config.base_resolution(),
        "objective": config.objective,
        "edm": config.edm.model_dump(mode="json") if config.edm else None,
        "optimizer": config.optimizer.model_dump(mode="json"),
        "stage": own,
    }


def _fingerprint(plan: Plan, name: str) -> str:
    return fingerprint(decisive_settings(plan, name))


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


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """ "key: old -> new" for everything in which two records of settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for name in sorted(old.keys() | new.keys())
            for line in differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if old == new else [f"{key}: {old} -> {new}"]

"""What a training run is told: a YAML file, then `dotted.key=value` arguments. What is wrong with
them is a line each. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.core.errors import SettingError, nearest
from pipeline.core.location import located
from pipeline.core.nulls import instead_of_null
from pipeline.core.text_files import read_yaml_text
from pipeline.core.yaml12 import parse, parse_arguments
from training.config import init_from
from training.config.settings import Config
from training.config.stage_settings import NOISE, Section, StageSettings
from training.masking.ratio import RatioSchedule


def load(arguments: Sequence[str]) -> Config:
    """`FILE.yaml [dotted.key=value …]` -> the resolved config.

    A file that says `base: OTHER.yaml` states only what differs from that file, which lies relative
    to it; mappings are merged key by key, anything else is replaced, and a stage of the base that
    is null (`stages: {masked: null}`) is taken away.

    Raises:
        SettingError: no such file, no YAML, an unknown key or stage, a wrong type; a line each.
    """
    files = [a for a in arguments if "=" not in a]
    if len(files) != 1:
        shown = " ".join(files) or "none"
        raise SettingError(
            f"give one YAML file, then dotted.key=value; files given: {shown}. "
            "For example: composer training/train.py yamls/demo.yaml stages.full.lr=1e-3"
        )
    return resolve(_read(Path(located(files[0])), [a for a in arguments if "=" in a]))


def resolve(raw: dict[str, Any]) -> Config:
    """A nested mapping as a YAML file holds it -> the config, each stage completed by `defaults`,
    then by what the objective and `fidelity` imply; and by what `init_from`'s weights say of
    themselves.

    Raises:
        SettingError: a key that is unknown or missing, or a value of a wrong type; a line each.
    """
    raw = dict(init_from.completed(raw))
    defaults = _mapping(raw.pop("defaults", None), "defaults")
    stages = _mapping(raw.get("stages"), "stages")
    if not stages:
        raise SettingError("stages: missing; name at least one, e.g. stages: {full: {steps: 1000}}")
    try:
        StageSettings.model_validate(defaults)
    except ValidationError as error:
        # Only a stage, not the defaults, has to be complete and consistent.
        wrong = [e for e in error.errors() if e["type"] not in ("missing", "value_error")]
        if wrong:
            raise SettingError(_lines(wrong, ["defaults"])) from error
    objective = raw.setdefault("objective", "edm")
    noise = NOISE.get(objective, {}) if isinstance(objective, str) else {}
    own = {str(k): _mapping(v, f"stages.{k}") for k, v in stages.items()}
    raw["stages"] = {name: {**noise, **defaults, **stage} for name, stage in own.items()}
    if objective == "edm":
        raw["edm"] = _mapping(raw.get("edm"), "edm")
    if raw.get("fidelity") == "released":
        raw["optimizer"] = _mapping(raw.get("optimizer"), "optimizer") | {"expert_lr": 1.0}
        for stage in raw["stages"].values():
            stage.update(ema=None, ema_start=0)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise SettingError(_lines(error.errors(), [])) from error


def _read(path: Path, overrides: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = _file(path, ())
    _known_stages(overrides, [str(key) for key in _mapping(file.get("stages"), "stages")])
    try:
        merged = _merged(file, parse_arguments(overrides))
        result = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise SettingError(f"{path}: {' '.join(str(error).split())}") from error
    return {str(key): value for key, value in result.items()}  # pyright: ignore


def _file(path: Path, above: tuple[Path, ...]) -> dict[Any, Any]:
    """What a file says, on top of what its base says. `above`: the files whose base it is."""
    shown = " -> ".join(map(str, (*above, path)))
    if path.resolve() in [other.resolve() for other in above]:
        raise SettingError(f"base: {shown}: a file cannot be its own base; remove one of them")
    try:
        file = parse(read_yaml_text(path), path)
    except OSError as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise SettingError(f"{shown}: {error.strerror}{near}") from error
    file = {} if file is None else file
    if not isinstance(file, dict):
        found = "a list" if isinstance(file, list) else repr(file)[:60]
        raise SettingError(f"{path}: expected a mapping of settings, found {found}")
    if "base" not in file:
        return file
    base = file.pop("base")
    if not isinstance(base, str):
        raise SettingError(f"{path}: base={base!r}: give one YAML file, relative to this one")
    return _merged(_file(path.parent / located(base), (*above, path)), file)


def _merged(base: Any, change: Any) -> Any:
    # OmegaConf's own merge refuses to put a mapping in the place of a list.
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    merged = base | {key: _merged(base.get(key), value) for key, value in change.items()}
    if isinstance(change.get("stages"), dict) and isinstance(base.get("stages"), dict):
        # A stage that is null is taken away; one that the base does not have is all defaults.
        gone = [n for n, s in change["stages"].items() if s is None and n in base["stages"]]
        merged["stages"] = {n: s for n, s in merged["stages"].items() if n not in gone}
    return merged


def _known_stages(overrides: list[str], stages: list[str]) -> None:
    """An argument must not invent a stage: OmegaConf would append it to the run."""
    for item in overrides:
        key = item.split("=")[0]
        parts = key.split(".")
        if parts[0] == "stages" and len(parts) > 1 and parts[1] not in stages:
            raise SettingError(
                f"{key}: no such stage{nearest(parts[1], stages)}; stages: {', '.join(stages)}"
            )


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingError(f"{name}={value!r}: must be a mapping of settings")
    return value


def _lines(errors: Sequence[ErrorDetails], prefix: list[str]) -> str:
    return "\n".join(dict.fromkeys(_line(error, prefix) for error in errors))


def _line(error: ErrorDetails, prefix: list[str]) -> str:
    """One pydantic error as "key=value: what to do"."""
    # "[key]", and the tags of alternatives, are no part of the key that the user wrote.
    parts = [str(part) for part in error["loc"]]
    unknown = parts[-1:] if error["type"] == "extra_forbidden" else []
    tagged = parts[:-1] if unknown else parts
    path = prefix + [part for part in tagged if not part.startswith("[")] + unknown
    key = ".".join(part if part.isprintable() and part.strip() else repr(part) for part in path)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggest(path)}"
    if error["type"] == "missing":
        where = " (there or in defaults)" if path[0] == "stages" else ""
        return f"{key}: missing; give it a value{where}"
    if error["type"] == "value_error":
        return f"{key}: {error['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    if error["input"] is None:
        return f"{key}=null: {_instead_of_null(path)}"
    shown = repr(error["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = f"{key}={shown}: {error['msg'][0].lower()}{error['msg'][1:]}"
    if error["type"] == "literal_error":
        message += nearest(str(error["input"]), re.findall("'(.*?)'", error["msg"]))
    return message


def _instead_of_null(path: list[str]) -> str:
    if path[0] == "defaults":
        return instead_of_null(StageSettings, path[1:])
    if path[0] == "stages":
        return instead_of_null(StageSettings, path[2:])
    return instead_of_null(Config, path)


def _suggest(path: list[str]) -> str:
    """The key that was probably meant: of this section, or of the same name in another one."""
    *section, word = path
    section = [part for part in section if not part.isdigit()]  # without places in a list
    known = _keys()
    siblings = {k[-1] for k in known if len(k) == len(section) + 1 and _matches(k[:-1], section)}
    elsewhere = [k for k in known if k[-1] == word and k[0] != "stages"]
    if elsewhere:
        return f'; did you mean "{".".join(min(elsewhere, key=len))}"?'
    return nearest(word, siblings) or f"; known: {', '.join(sorted(siblings))}"


def _matches(pattern: Sequence[str], section: Sequence[str]) -> bool:
    return all(p in ("*", s) for p, s in zip(pattern, section, strict=True))


def _keys() -> list[tuple[str, ...]]:
    """Every key there is, as a path; "*" stands for the name of a stage."""
    paths: list[tuple[str, ...]] = [("defaults",)]
    for name, field in Config.model_fields.items():
        paths.append((name,))
        inner = _keys_of(field.annotation)
        if get_origin(field.annotation) is dict:
            paths += [("defaults", *path) for path in inner]
            paths += [(name, "*", *path) for path in inner]
        else:
            paths += [(name, *path) for path in inner]
    return paths


def _keys_of(annotation: Any) -> list[tuple[str, ...]]:
    """The keys of all sections that a type is made of, and of the sections in them."""
    if isinstance(annotation, type) and issubclass(annotation, Section | RatioSchedule):
        return [
            path
            for key, field in annotation.model_fields.items()
            for name in [field.alias or key]
            for path in [(name,), *((name, *inner) for inner in _keys_of(field.annotation))]
        ]
    return [path for part in get_args(annotation) for path in _keys_of(part)]

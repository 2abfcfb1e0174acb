"""What a command is told: yamls/data/<source>.yaml, then flags. Unknown keys are errors."""

from __future__ import annotations

import os
import pkgutil
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core import layout
from pipeline.core.commits import MAX_REJECT_RATE
from pipeline.core.errors import SettingError, nearest
from pipeline.core.links import harmless
from pipeline.core.location import Location, located
from pipeline.core.nulls import instead_of_null
from pipeline.core.rules import Rules
from pipeline.core.stage import Stage
from pipeline.core.text_files import read_yaml_text
from pipeline.sources import SOURCES
from pipeline.stages import STAGES

if TYPE_CHECKING:
    from pipeline.stages.download import Source
    from pipeline.stages.encode_settings import EncodeSettings


class CaptionConfig(BaseModel):
    """What further keys there are is the captioner's to say: its Settings (docs/caption.md)."""

    model_config = ConfigDict(extra="allow")
    captioner: Location = "colour"
    clean: list[str] | str = []  # steps of pipeline.stages.caption_text


class EncodeConfig(BaseModel):
    """Defaults are the paper's; see pipeline.stages.encode.EncodeSettings."""

    model_config = ConfigDict(extra="forbid")
    vae: Location = "sdxl"
    text_encoder: Location = "dfn5b-h14"
    resolutions: list[int] = [256, 512]
    captions: str = "alt"
    text: str = "full"
    text_dtype: str = "float16"
    latents: str = "mean"
    crop: str = "center"
    small: str = "reject"
    dtype: str = "auto"
    batch_size: int | Literal["auto"] = "auto"
    seed: int = 0
    device: str = "cpu"
    compile: bool = False
    hashes: list[str] = []
    compression: str | None = None


class DataConfig(BaseModel):
    """One file of yamls/data/."""

    model_config = ConfigDict(extra="forbid")
    source: str  # its name: of its folder under the root, of its YAML, in reports
    kind: str = ""  # what kind of source it is, where its name is not one of the table
    #: A shard with a larger share of rejects is not committed: an outage or a wrong setting.
    max_reject_rate: float = Field(default=MAX_REJECT_RATE, ge=0, le=1)
    download: dict[str, Any] = Field(default_factory=dict)  # the source's own settings
    rules: dict[str, Any] = Field(default_factory=dict)  # what differs from the source's rules
    caption: CaptionConfig = CaptionConfig()
    encode: EncodeConfig = EncodeConfig()


def load_config(source: str | None, path: Path | None, overrides: dict[str, Any]) -> DataConfig:
    """The source's YAML (`path`, or that of its name: see `default_yaml`), then `overrides`.

    Args:
        source: a name of the table, or of a YAML that says of which kind it is; None takes it from
            the file.
        overrides: dotted key -> value; None values are flags that were not given.

    Raises:
        SettingError: unreadable file, unknown key or wrong type.
    """
    if path is None and source is not None:
        path = default_yaml(source)
    record: dict[str, Any] = {}
    if path is not None:
        record = read_yaml(path)
    if source is not None:
        record["source"] = source
    for key, value in overrides.items():
        if value is not None:
            section, dot, name = key.partition(".")
            if not dot:
                record[section] = value
                continue
            if not isinstance(record.setdefault(section, {}), dict):
                raise SettingError(f"{path}: {section} must be a mapping")
            record[section][name] = value
    try:
        config = DataConfig.model_validate(record)
    except ValidationError as error:
        raise SettingError(one_line(error, DataConfig)) from error
    if layout.slug(config.source) != config.source or config.source.startswith("."):
        raise SettingError(
            f"source={config.source}: a name is one folder: letters, digits, '.', '_', '+' and '-'"
        )
    if config.kind:
        known(config.kind, SOURCES, "kind")
    return config


def default_yaml(source: str) -> Path | None:
    """yamls/data/<source>.yaml of the working folder, else of the package; None where neither has
    one."""
    package = Path(str(files("pipeline.sources") / "yamls"))
    for folder in (Path("yamls", "data"), package):
        if "/" not in source and (folder / f"{source}.yaml").is_file():
            return folder / f"{source}.yaml"
    return None


def check_names(overrides: dict[str, Any]) -> None:
    """Names and choices that were given with options, before anything is looked for under a root.

    Raises:
        SettingError: one that does not exist.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if "kind" in given:
        known(given["kind"], SOURCES, "kind")
    if "caption.captioner" in given:
        from pipeline.stages.caption import check_captioner

        check_captioner(given["caption.captioner"])
    encode = {k.removeprefix("encode."): v for k, v in given.items() if k.startswith("encode.")}
    if not encode:
        return
    from pipeline.encoders import locate_text, locate_vae

    try:
        config = EncodeConfig.model_validate(encode)
    except ValidationError as error:
        raise SettingError(one_line(error, EncodeConfig, "encode.")) from error
    encode_settings(config)
    if "vae" in encode:
        locate_vae(encode["vae"])
    if "text_encoder" in encode:
        locate_text(encode["text_encoder"])


def read_yaml(path: Path) -> dict[str, Any]:
    from pipeline.core.yaml12 import parse

    try:
        record = parse(read_yaml_text(path), f"--config {path}") or {}
    except OSError as error:
        raise SettingError(f"--config {path}: {error.strerror}") from error
    if not isinstance(record, dict):
        raise SettingError(f"--config {path}: expected a mapping, found {type(record).__name__}")
    return record


def source_settings(config: DataConfig) -> Source:
    """The source's own settings object, validated.

    Raises:
        SettingError: no such kind of source, or a setting that it does not have or cannot use.
    """
    if not config.kind and config.source not in SOURCES:
        raise SettingError(
            f"source={config.source}: unknown{nearest(config.source, SOURCES)}; known: "
            f"{', '.join(SOURCES)}; for a name of your own say which of them it is with --kind, or "
            f"`kind:` in yamls/data/{config.source}.yaml"
        )
    cls = pkgutil.resolve_name(SOURCES[config.kind or config.source])
    try:
        return cls.model_validate(config.download)
    except ValidationError as error:
        raise SettingError(one_line(error, cls, f"source {config.source}: ")) from error


def source_rules(config: DataConfig, source: Source) -> Rules:
    """What pictures of this source have to meet: its defaults, then the config's."""
    try:
        return Rules.model_validate({**source.rules.model_dump(), **config.rules})
    except ValidationError as error:
        raise SettingError(one_line(error, Rules, "rules: ")) from error


def build_stage(name: str, config: DataConfig, retry_failed: bool = False) -> Stage:
    """The stage of that name over a source's config.

    Args:
        retry_failed: see pipeline.stages.download.Download; other stages fetch nothing.

    Raises:
        SettingError: unknown stage, or a setting the stage cannot use.
    """
    known(name, STAGES, "stage")
    cls = pkgutil.resolve_name(STAGES[name])
    if name == "download":
        settings = source_settings(config)
        rules = source_rules(config, settings)
        return cls(config.source, settings, config.max_reject_rate, rules, retry_failed)
    if name == "caption":
        own = config.caption.model_extra
        captioner, clean = config.caption.captioner, config.caption.clean
        return cls(config.source, captioner, config.max_reject_rate, own, clean)
    return cls(config.source, encode_settings(config.encode), config.max_reject_rate)


def encode_settings(config: EncodeConfig) -> EncodeSettings:
    """Raises SettingError for a value that is none of its choices."""
    from pipeline.stages.encode_settings import EncodeSettings

    values = config.model_dump()
    for name in ("resolutions", "hashes"):
        values[name] = tuple(values[name])
    return EncodeSettings(**values)


def default_root() -> str:
    return located(os.environ.get(layout.ROOT_VARIABLE) or layout.DEFAULT_ROOT)


def known(name: str, table: dict[str, str], kind: str) -> None:
    if name not in table:
        raise SettingError(
            f"{kind}={name}: unknown{nearest(name, table)}; known: {', '.join(table)}"
        )


def one_line(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """A pydantic error as one line: key, value, remedy. The first of several problems."""
    first = error.errors()[0]
    # Pydantic adds which alternative of a union it tried: no part of the key that the user wrote.
    keys = [str(p) for p in first["loc"] if p != "int" and not str(p).startswith("literal[")]
    name = ".".join(keys)
    if first["type"] == "extra_forbidden":
        siblings = _fields(model, keys[:-1])
        return (
            f"{prefix}unknown key {name}{nearest(keys[-1], siblings)}; known: {', '.join(siblings)}"
        )
    if first["type"] == "missing":
        return f"{prefix}{name} is required"
    if first.get("input") is None:
        return f"{prefix}{name}=null: {instead_of_null(model, keys)}"
    # What is wrong may be that the value holds a password.
    value = harmless(repr(first.get("input")))
    return f"{prefix}{name}={value}: {first['msg'].removeprefix('Value error, ')}"


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)

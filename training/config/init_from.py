"""`init_from`: the weights that a run's first stage starts from instead of random ones.

What a YAML does not say of network, encoders and objective is theirs; what it does say has to be,
and is compared before data is looked at. No torch here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.core.errors import SettingError
from pipeline.core.location import located
from pipeline.core.manifest import TextFacts, VaeFacts, mismatches
from training.config.plan import TrainingPlan
from training.config.settings import Config
from training.network.config import MODELS, DiTConfig
from training.weights import weights_metadata

RESOLUTION = ("input_size", "pos_interp_scale")  # of DiTConfig; no weights depend on them
GIVEN = (*RESOLUTION, "in_channels", "caption_width", "caption_length")  # by encoders and stage
UNREAD = ("revision", "dtype", "repo")  # the same weights may come from elsewhere


def completed(raw: dict[str, Any]) -> dict[str, Any]:
    """Settings as a YAML file holds them, with what the weights of `init_from` say of encoders,
    network and objective wherever nothing else is said.

    Raises:
        SettingError: no such file, or none of ours.
    """
    start = raw.get("init_from")
    if not (isinstance(start, str) and start):
        return raw
    metadata, raw = _metadata(located(start)), dict(raw)
    own = {
        "vae": metadata.vae.name,
        "text_encoder": metadata.text_encoder.name,
        "text": metadata.text,
    }
    _fill(raw, "data", own)
    model = raw.get("model")
    if not (isinstance(model, dict) and model.get("arch")):
        _fill(raw, "model", _sizes(metadata.network()))
    if raw.setdefault("objective", metadata.objective["name"]) == "edm":
        scale = metadata.objective.get("sigma_data")
        _fill(raw, "edm", {} if scale is None else {"sigma_data": scale})
    return raw


def _fill(raw: dict[str, Any], section: str, own: dict[str, Any]) -> None:
    said = raw.get(section)
    if said is None or isinstance(said, dict):  # what else it is, is an error of its own
        said = said or {}
        raw[section] = own | {k: v for k, v in said.items() if v is not None or k not in own}


def _sizes(network: DiTConfig) -> dict[str, Any]:
    """A section `model:` that is this network, whatever its encoders and resolution."""

    def differing(base: DiTConfig) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(network)]
        pairs = {n: (getattr(network, n), getattr(base, n)) for n in names if n not in GIVEN}
        return {name: own for name, (own, theirs) in pairs.items() if own != theirs}

    for arch, base in MODELS.items():
        if not differing(base):
            return {"arch": arch}
    return {"arch": "custom", **differing(DiTConfig())}


def complete(config: Config) -> Config:
    """The config with `model.base_resolution` as the weights have it, unless it is stated: the
    positions of another resolution are derived from theirs.

    Raises:
        SettingError: no such file, or none of ours.
    """
    if not config.init_from or config.model.base_resolution is not None:
        return config
    metadata = _metadata(config.init_from)
    base = round(metadata.resolution / metadata.network().pos_interp_scale)
    model = config.model.model_copy(update={"base_resolution": base})
    return config.model_copy(update={"model": model})


def check(plan: TrainingPlan, network: DiTConfig) -> None:
    """That the weights are of this run's network, encoders, text mode and noise scale. The data is
    not looked at: see `check_encoders`.

    Args:
        network: of the first stage.

    Raises:
        SettingError: names setting, both values and a remedy.
    """
    config = plan.config
    if not config.init_from:
        return
    metadata, where = _metadata(config.init_from), f"init_from={config.init_from}"
    # The same weights may have another name there.
    _same_encoders(where, metadata, plan.vae, plan.text, ("name", "weights_sha256"))
    pairs: list[tuple[str, Any, Any]] = [
        ("data.text", config.data.text, metadata.text),
        ("objective", config.objective, metadata.objective["name"]),
    ]
    if config.edm is not None:
        theirs = metadata.objective.get("sigma_data")
        pairs.append(("edm.sigma_data", config.edm.sigma_data, theirs))
    for key, own, found in pairs:
        if own != found:
            raise SettingError(f"{key}={own}: {where} was trained with {found}; set {key}={found}")
    for field in dataclasses.fields(network):
        own, found = getattr(network, field.name), getattr(metadata.network(), field.name)
        if field.name not in RESOLUTION and own != found:
            raise SettingError(
                f"{where}: weights of another architecture ({field.name}: {found}, this run's "
                f"{own}); leave model: out to take theirs, or choose other weights"
            )


def check_encoders(plan: TrainingPlan) -> None:
    """That the weights are of the very encoders that made the shards.

    Raises:
        SettingError: names both and a remedy.
    """
    config = plan.config
    if config.init_from:
        where = f"init_from={config.init_from}"
        _same_encoders(where, _metadata(config.init_from), *_facts(plan))


def _same_encoders(
    where: str,
    metadata: weights_metadata.WeightsMetadata,
    vae: VaeFacts,
    text: TextFacts,
    ignore: tuple[str, ...] = (),
) -> None:
    for kind, own, found in (
        ("vae", vae, metadata.vae),
        ("text_encoder", text, metadata.text_encoder),
    ):
        lines = _differences(own, found, ignore)
        if lines:
            raise SettingError(
                f"{where}: its {kind} is {found.name}, that of this run {own.name} "
                f"({'; '.join(lines)}); encode the shards with the weights' own, or choose others"
            )


def path(config: Config) -> Path:
    """The weights file.

    Raises:
        SettingError: there is none.
    """
    return _path(config.init_from)


def _path(start: str) -> Path:
    try:
        return weights_metadata.find(start)
    except SettingError as error:
        raise SettingError(str(error).replace("checkpoint ", "init_from=", 1)) from error


def _metadata(start: str) -> weights_metadata.WeightsMetadata:
    try:
        return weights_metadata.read_metadata(_path(start))
    except SettingError as error:
        text = str(error).removeprefix(f"init_from={start}: ").removeprefix(f"{start}: ")
        raise SettingError(f"init_from={start}: {text}") from error


def content_hash(config: Config) -> str:
    """sha256 of the weights file: where it lies does not decide a run's result."""
    return weights_metadata.file_hash(path(config))


def _facts(plan: TrainingPlan) -> tuple[VaeFacts, TextFacts]:
    """With the weights' hashes, where there are shards to tell them."""
    for sources in plan.data.values():
        return sources[0].latents.vae, sources[0].text.text_encoder
    return plan.vae, plan.text


def _differences(own: Any, found: Any, ignore: tuple[str, ...]) -> list[str]:
    hashes = own.weights_sha256, found.weights_sha256
    if all(hashes) and hashes[0] == hashes[1]:
        return mismatches(own, found, ignore=(*UNREAD, "name"))
    unknown = () if all(hashes) else ("weights_sha256",)
    return mismatches(own, found, ignore=(*UNREAD, *unknown, *ignore))

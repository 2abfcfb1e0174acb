"""`init_from`: the weights that a run's first stage starts from instead of random ones.

Here is what can be known without torch; `training.assemble` compares the architectures. No torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from pipeline.core.errors import SettingError
from pipeline.core.manifest import TextFacts, VaeFacts, mismatches
from training import header
from training.settings import Config

if TYPE_CHECKING:
    from training.preflight import Plan

UNREAD = ("revision", "dtype", "repo")  # the same weights may come from elsewhere


def complete(config: Config) -> Config:
    """The config with `model.base_resolution` as the weights have it, unless it is stated: the
    positions of another resolution are derived from theirs.

    Raises:
        SettingError: no such file, or none of ours.
    """
    if not config.init_from or config.model.base_resolution is not None:
        return config
    record = _record(config)
    base = round(record["resolution"] / record["model"].get("pos_interp_scale", 1.0))
    model = config.model.model_copy(update={"base_resolution": base})
    return config.model_copy(update={"model": model})


def check(plan: Plan) -> None:
    """That the weights are of the encoders, the text mode and the noise scale of this run.

    Raises:
        SettingError: names setting, both values and a remedy.
    """
    config = plan.config
    if not config.init_from:
        return
    record, where = _record(config), f"init_from={config.init_from}"
    vae, text = _facts(plan)
    for kind, own, found in (
        ("vae", vae, VaeFacts.model_validate(record["vae"])),
        ("text_encoder", text, TextFacts.model_validate(record["text_encoder"])),
    ):
        lines = _differences(own, found)
        if lines:
            raise SettingError(
                f"{where}: its {kind} is {found.name}, that of this run {own.name} "
                f"({'; '.join(lines)}); encode the shards with the weights' own, or choose others"
            )
    theirs = _objective(record)
    pairs: list[tuple[str, Any, Any]] = [
        ("data.text", config.data.text, record["text"]),
        ("objective", config.objective, theirs["name"]),
    ]
    if config.edm is not None:
        pairs.append(("edm.sigma_data", config.edm.sigma_data, theirs.get("sigma_data")))
    for key, own, found in pairs:
        if own != found:
            raise SettingError(f"{key}={own}: {where} was trained with {found}; set {key}={found}")


def path(config: Config) -> Path:
    """The weights file.

    Raises:
        SettingError: there is none.
    """
    try:
        return header.find(config.init_from)
    except SettingError as error:
        raise SettingError(str(error).replace("checkpoint ", "init_from=", 1)) from error


def content_hash(config: Config) -> str:
    """sha256 of the weights file: where it lies does not decide a run's result."""
    return header.file_hash(path(config))


def _record(config: Config) -> dict[str, Any]:
    where = f"init_from={config.init_from}"
    file = path(config)
    try:
        record = header.read_record(file)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from error
    lost = [k for k in ("vae", "text_encoder", "text", "model", "resolution") if k not in record]
    if not {"edm", "objective"} & record.keys():
        lost.append("objective")
    if lost:
        raise SettingError(f"{where}: broken passport ({lost[0]} is missing)")
    return record


def _objective(record: dict[str, Any]) -> dict[str, Any]:
    """Its name and fields; of a passport of schema 1, EDM's."""
    return record.get("objective") or {"name": "edm", **record["edm"]}


def _facts(plan: Plan) -> tuple[VaeFacts, TextFacts]:
    """With the weights' hashes, where there are shards to tell them."""
    for sources in plan.data.values():
        return sources[0].latents.vae, sources[0].text.text_encoder
    return plan.vae, plan.text


def _differences(own: Any, found: BaseModel) -> list[str]:
    hashes = own.weights_sha256, getattr(found, "weights_sha256", "")
    if all(hashes) and hashes[0] == hashes[1]:
        return mismatches(own, found, ignore=(*UNREAD, "name"))
    unknown = () if all(hashes) else ("weights_sha256",)
    return mismatches(own, found, ignore=(*UNREAD, *unknown))

"""What all shards of a group have in common: who made them and how, as their commits' inputs say.

A group's manifest is these facts and nothing else, so it describes the data, not a command. Shards
of different facts cannot share a group: one manifest would lie about some of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.core import mix
from pipeline.core.commits import differences
from pipeline.core.manifest import LatentsManifest, Manifest, OfficialManifest, TextManifest
from pipeline.core.store import canonical_json

#: Kind of group -> what its shards have in common, of the inputs that a commit may leave out.
_COMMON: dict[str, dict[str, Any]] = {
    "captions": {"captioner": None, "revision": "", "model": ""},
    "latents": {
        **{"vae": None, "resolution": None, "latents": None},
        # `pipeline convert import` does not state these: the official code's.
        **{"crop": "center", "small": "reject", "dtype": "float16", "official_form": ""},
    },
    "text": {"text_encoder": None, "captions": None, "text": None, "dtype": "float16"},
    "official": {
        **{"vae": None, "text_encoder": None, "latents": None, "crop": None, "captions": None},
        **{"text_dtype": "", "split": None, "official_form": "", "latents_made": None},
    },
}
_MANIFESTS: dict[str, type[Manifest]] = {
    "latents": LatentsManifest,
    "text": TextManifest,
    "official": OfficialManifest,
}
_ENCODERS = ("vae", "text_encoder")
_ORIGIN = ("repo", "revision")  # of an encoder: the same weights may come from elsewhere
COUNTS = ("samples", "splits", "shards")  # fields of a manifest that are sums over commits


def kind_of(group: str) -> str:
    """ "latents" of "cc12m/latents/sdxl/256"."""
    return f"{group}/".split("/")[1]


def indexed(group: str) -> bool:
    """Whether a group has an index and a manifest: those that training or others read by MDS."""
    return kind_of(group) in _MANIFESTS


def of(group: str, inputs: Mapping[str, Any]) -> str:
    """The facts in a commit's inputs, as JSON; "" where they do not tell."""
    names = _COMMON.get(kind_of(group), {})
    found = {name: inputs.get(name, default) for name, default in names.items()}
    if not found or None in found.values():
        return ""
    if isinstance(found.get("captions"), dict):
        found["captions"] = str(mix.Mix(found["captions"]))
    converted = inputs.get("stage") in ("export", "import")
    if converted and found.get("official_form") == "" and found["vae"].get("shift"):
        found["official_form"] = "raw less shift, times scale"  # of a release that applied it
    if "latents_made" in found:
        found["resolutions"] = sorted(map(int, found.pop("latents_made")))
    if kind_of(group) == "official" and found["latents"] == "moments":
        found["latents"] = "mean"  # which is what is exported of them
    return sys.intern(canonical_json(found).decode())  # ten thousand shards share a few texts


def of_manifest(manifest: Manifest) -> str:
    """The facts that a manifest states."""
    found = manifest.model_dump(exclude={"schema_version", "kind", "source", *COUNTS})
    return canonical_json(found).decode()


def clashes(wanted: str, there: str, rounding: bool = True) -> list[str]:
    """Why shards of these facts cannot share a group, in words: "vae.scale: 0.5 -> 0.13".

    What only one of them states, or states as "", is unknown, not different. The same weights from
    another place are the same.

    Args:
        rounding: count the type in which an encoder computed.
    """
    unread = _ORIGIN if rounding else (*_ORIGIN, "dtype")
    if wanted == there or not wanted or not there:
        return []
    new, old = json.loads(wanted), json.loads(there)
    for name in old.keys() & new.keys():
        if name == "captions" and mix.same(old[name], new[name]):
            new[name] = old[name]
        if name in _ENCODERS:
            _forget(old[name], new[name], unread)
    _forget(old, new, ())
    return differences(old, new)


def _forget(old: dict[str, Any], new: dict[str, Any], names: tuple[str, ...]) -> None:
    """Takes out of both what is not known of both, and these."""
    for name in [*old, *new]:
        if name in names or "" in (old.get(name, ""), new.get(name, "")):
            old.pop(name, None)
            new.pop(name, None)


def manifest(group: str, found: Iterable[str], counts: Mapping[str, Any]) -> Manifest:
    """The metadata of a group whose shards have these facts, which do not clash.

    What they state differently, such as where the same weights came from, is unknown: "".
    """
    kind = _MANIFESTS[kind_of(group)]
    merged: dict[str, Any] = {}
    for record in map(json.loads, sorted(found)):
        _merge(merged, record)
    own = {name: value for name, value in merged.items() if name in kind.model_fields}
    return kind.model_validate({"source": group.split("/")[0], **own, **counts})


def _merge(merged: dict[str, Any], record: dict[str, Any]) -> None:
    for name, value in record.items():
        if isinstance(value, dict):
            _merge(merged.setdefault(name, {}), value)
        elif merged.setdefault(name, value) != value:
            merged[name] = ""

"""Images to sentences. A leaf package, usable alone:

from captioning import load
captions = load("colour")(images)   # list[PIL.Image] -> list[Caption]
captions = load("llava-1.5-7b", prompt="short", device="cuda")(images)
"""

from __future__ import annotations

import difflib
import pkgutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from captioning.captioner import (
    Answer,
    BadPicture,
    BadSetting,
    Caption,
    Captioner,
    Failure,
    Picture,
    Settings,
)

__all__ = [
    "CAPTIONERS",
    "Answer",
    "BadPicture",
    "BadSetting",
    "Caption",
    "Captioner",
    "Failure",
    "Picture",
    "Settings",
    "find",
    "load",
]

#: Captioner name -> class ("module:attribute"). A folder or hub id is a MODEL.
CAPTIONERS: dict[str, str] = {
    "colour": "captioning.colour:ColourCaptioner",
    "endpoint": "captioning.endpoint.captioner:EndpointCaptioner",
    "llava-1.5-7b": "captioning.vlm.captioner:VisionLanguageModel",
    "llava-1.6-7b": "captioning.vlm.captioner:VisionLanguageModel",
}
# What transformers' AutoModelForImageTextToText loads.
MODEL = "captioning.vlm.captioner:VisionLanguageModel"


def find(name: str) -> type[Captioner]:
    """The class of a captioner: a name of CAPTIONERS, a folder, or a hub id "owner/name[@revision]"
    of a model.

    Raises:
        BadSetting: it is none of these.
    """
    if name in CAPTIONERS:
        return pkgutil.resolve_name(CAPTIONERS[name])
    if Path(name).is_dir() or name.partition("@")[0].count("/") == 1:
        return pkgutil.resolve_name(MODEL)
    raise BadSetting(
        f"captioner={name}: unknown{_nearest(name, CAPTIONERS)}; known: {', '.join(CAPTIONERS)}, "
        "a folder, or a hub id owner/name"
    )


def load(name: str, **settings: Any) -> Captioner:
    """The captioner of that name; `settings` are fields of its `Settings`.

    Raises:
        BadSetting: no such captioner, an unknown setting or a value that cannot be used.
    """
    cls = find(name)
    known = [field.name for field in fields(cls.Settings)]
    for setting in settings:
        if setting not in known:
            raise BadSetting(
                f"{setting}: no setting of captioner={name}{_nearest(setting, known)}; "
                f"known: {', '.join(known) or 'none'}"
            )
    if name not in CAPTIONERS and Path(name).is_dir():
        name = str(Path(name))  # "models/x/" is "models/x": the name is in what is written
    return cls(name, cls.Settings(**settings))


def _nearest(word: str, known: Any) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{match[0]}"?' if match else ""

"""What a data root has: its sources, and the groups of each."""

from __future__ import annotations

from pipeline.core import layout
from pipeline.core.errors import SettingError, nearest
from pipeline.core.store import Store
from pipeline.sources import SOURCES


def sources_of(store: Store, source: str | None = None) -> list[str]:
    """The sources under a root, or the one that is named.

    Raises:
        SettingError: nothing is there, or no such source.
    """
    sources = [
        name
        for name in store.folders("")
        if set(layout.KINDS) & set(store.folders(name)) and groups_of(store, name)
    ]
    if not sources:
        hint = "" if source is None or source in SOURCES else nearest(source, SOURCES)
        hint = f" (source={source}: unknown{hint})" if hint else ""
        raise SettingError(
            f"--root {store.root}: nothing there{hint}; start with "
            "`pipeline run download --source openmoji`"
        )
    if source is not None and source not in sources:
        raise SettingError(
            f"source={source}: not under {store.root}{nearest(source, sources)}; "
            f"there: {', '.join(sources)}"
        )
    return sources if source is None else [source]


def groups_of(store: Store, source: str) -> list[str]:
    """Groups of a source, as paths below it, in order: folders that hold commits or failures."""
    return _groups(store, source, "")


def _groups(store: Store, source: str, folder: str) -> list[str]:
    found = []
    for name in store.folders(f"{source}/{folder}".rstrip("/")):
        path = f"{folder}/{name}".lstrip("/")
        below = store.folders(f"{source}/{path}")
        if "commits" in below or "failures" in below:
            found.append(path)
        elif below and name not in ("runs", "drops"):
            found += _groups(store, source, path)
    return found

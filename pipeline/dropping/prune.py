"""`pipeline prune`: files below a source that no commit names: what redone shards replaced, what
dead runs left, and uploads to S3 that nobody will complete.

A training that started before a shard was redone may still read the file that was replaced: prune
when such trainings are over.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from pipeline.core import layout, process, summary, uploads
from pipeline.core.commits import scan
from pipeline.core.errors import BrokenShard, SettingError
from pipeline.core.store import TEMPORARY, Entry, Store, size
from pipeline.core.uploads import Upload
from pipeline.engine.inventory import groups_of

SHOWN = 3  # names of a group in the listing for people

# What a group holds beside the files that its commits name.
_KEPT = re.compile(
    rf"(index\.json|manifest\.json|{re.escape(summary.NAME)}|(commits|failures|leases)/[^/]+\.json)"
)


@dataclass
class Garbage:
    """What can go in one folder."""

    folder: str  # a group, or another folder of a source
    files: list[Entry] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)


def find(store: Store, source: str) -> list[Garbage]:
    """What can go, by group. The caller has seen to it that no run writes there.

    Only files of the folders that hold groups are looked at, and temporary files of processes that
    are gone: other things that someone keeps beside them are left alone.

    Raises:
        SettingError: a commit cannot be read, so what it names cannot be told.
    """
    groups = sorted((f"{source}/{g}" for g in groups_of(store, source)), key=len, reverse=True)
    named = {group: _named(store, group) for group in groups}
    found: dict[str, Garbage] = {}
    for entry in store.walk(source):
        group = next((g for g in groups if entry.path.startswith(f"{g}/")), None)
        folder, _, name = entry.path.rpartition("/")
        if TEMPORARY in name and name.startswith("."):
            garbage = _is_left(name)
        elif group is not None:
            garbage = not _is_kept(entry.path[len(group) + 1 :], named[group])
        else:  # a group whose first run died before its first commit
            garbage = entry.path.split("/")[1] in layout.KINDS and "/leases/" not in entry.path
        if garbage:
            where = group or folder
            found.setdefault(where, Garbage(where)).files.append(entry)
    for upload in uploads.unfinished(store, source):
        where = next((g for g in groups if upload.path.startswith(f"{g}/")), None)
        where = where or upload.path.rpartition("/")[0]
        found.setdefault(where, Garbage(where)).uploads.append(upload)
    return [found[where] for where in sorted(found)]


def delete(store: Store, garbage: list[Garbage]) -> None:
    """Deletes what `find` found. The caller holds the leases of the groups."""
    for found in garbage:
        for entry in found.files:
            store.delete(entry.path)
        for upload in found.uploads:
            uploads.abort(store, upload)
        for folder in {entry.path.rpartition("/")[0] for entry in found.files}:
            store.remove_empty(folder)


def leased(store: Store, source: str) -> list[str]:
    """Folders of a source where a run may be writing: its groups, and those that are to be."""
    groups = {f"{source}/{group}" for group in groups_of(store, source)}
    for entry in store.walk(source):
        folder, _, _ = entry.path.rpartition("/")
        if folder.endswith("/leases"):
            groups.add(folder.removesuffix("/leases"))
    return sorted(groups)


def common(first: list[Garbage], second: list[Garbage]) -> list[Garbage]:
    """What was garbage at both times: shown to the user, and not in use since."""
    files = {(entry.path, entry.version) for found in first for entry in found.files}
    sent = {upload for found in first for upload in found.uploads}
    return [
        Garbage(
            found.folder,
            [entry for entry in found.files if (entry.path, entry.version) in files],
            [upload for upload in found.uploads if upload in sent],
        )
        for found in second
    ]


def show(garbage: list[Garbage]) -> list[str]:
    """A line a group, and their total."""
    lines = []
    for found in garbage:
        names = [entry.path[len(found.folder) + 1 :] for entry in found.files[:SHOWN]]
        more = ", …" if len(found.files) > SHOWN else ""
        files = f"{len(found.files)} files, {size(found.bytes)} ({', '.join(names)}{more})"
        parts = [files] if found.files else []
        if found.uploads:
            parts.append(f"{len(found.uploads)} unfinished uploads")
        lines.append(f"{found.folder}: {'; '.join(parts)}")
    return [*lines, f"in all: {total(garbage)}"]


def total(garbage: list[Garbage]) -> str:
    files = sum(len(found.files) for found in garbage)
    sent = sum(len(found.uploads) for found in garbage)
    text = f"{files} files, {size(sum(found.bytes for found in garbage))}"
    return text + (f", {sent} unfinished uploads" if sent else "")


def as_json(garbage: list[Garbage], deleted: bool) -> str:
    groups = [
        {
            "folder": found.folder,
            "bytes": found.bytes,
            "files": [{"path": e.path, "bytes": e.bytes} for e in found.files],
            "uploads": [upload._asdict() for upload in found.uploads],
        }
        for found in garbage
    ]
    return json.dumps({"deleted": deleted, "groups": groups}, indent=1)


def _named(store: Store, group: str) -> set[str]:
    names: set[str] = set()
    try:
        for commit in scan(store, group):
            names |= commit.files.keys()
            # img2dataset's statistics beside a tar hold times, so no commit names them.
            names |= {f"{n[:-4]}_stats.json" for n in commit.files if n.endswith(".tar")}
    except (BrokenShard, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(
            f"{store.url(group)}: a commit record is broken, so what it named cannot be told; run "
            "`pipeline verify --repair` first"
        ) from error
    return names


def _is_kept(name: str, named: set[str]) -> bool:
    return name in named or _KEPT.fullmatch(name) is not None


def _is_left(name: str) -> bool:
    """Whether a temporary file's process is gone; one of another host writes under a lease."""
    who = name.split(TEMPORARY)[1].rpartition("-")[0]
    try:
        return process.is_dead(who) or not process.is_here(who)
    except ValueError:  # of an older version
        return True

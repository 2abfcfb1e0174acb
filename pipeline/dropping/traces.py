"""Where dropped samples still lie under a root: groups, lists of links, pages, superseded files.

One question for two commands: what `pipeline drop --purge` is to remove, and what `pipeline verify
--dropped` must not find. It is asked of the bytes themselves and not of what commits say of them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import drops, layout
from pipeline.core.commits import Commit, read_commit, read_file, read_named, scan
from pipeline.core.errors import BrokenShard
from pipeline.core.mds import decode_shard, unpack
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.core.tars import read_samples
from pipeline.core.urls import canonical_links
from pipeline.dropping import prune
from pipeline.engine.inventory import groups_of
from pipeline.sources.tables import url_lists

NOTES = frozenset({"error_message", "detail"})  # columns in which a reject may name another sample
_FIGURE = re.compile(r'<figure>(?:(?!</figure>).)*?alt="([^"]*)".*?</figure>\s*', re.DOTALL)
_UNREAD = re.compile(r"<p>not shown: (.*?): .*?</p>\s*", re.DOTALL)
_WORD = re.compile(r"[^\s\"'<>,:;()\[\]{}]+")


@dataclass(frozen=True)
class Trace:
    """One place that still holds something of dropped samples."""

    place: str  # relative to the root
    count: int
    what: str  # of which there are so many

    def __str__(self) -> str:
        return f"{self.place}: {self.count} {self.what}"


@dataclass(frozen=True)
class Known:
    """What was taken out of a source."""

    keys: dict[str, frozenset[str]]  # by shard
    links: frozenset[str]  # hashes

    @property
    def every(self) -> frozenset[str]:
        return frozenset().union(*self.keys.values())

    def __bool__(self) -> bool:
        return bool(self.keys or self.links)


def groups_in(store: Store, source: str) -> list[str]:
    """The groups of a source, of whatever kind, settings or age."""
    groups = groups_of(store, source)
    return [f"{source}/{group}" for group in groups if group.split("/")[0] in layout.KINDS]


def known(store: Store, source: str) -> Known:
    return Known(drops.read(store, source), drops.read_links(store, source))


def learn(
    store: Store, source: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Known:
    """What is known, with what the pictures' parquets add to it.

    The links of dropped samples are down as well, so that their lists are found, but not those that
    a sample that stays came from (a duplicate's may be the same). And samples whose links were
    taken down are out, however they came back.
    """
    before = known(store, source)
    if not before:
        return before
    group = layout.images_group(source)
    keys = {shard: set(found) for shard, found in before.keys.items()}
    gone: set[str] = set()
    for shard, out in before.keys.items():
        if commit := read_commit(store, group, shard):
            gone |= {link for key, link in _links(store, group, commit) if key in out}
    asked = gone | before.links
    total = len(store.names(f"{group}/commits")) if asked else 0
    for number, commit in enumerate(scan(store, group) if asked else (), 1):
        out = before.keys.get(commit.shard, frozenset())
        for key, link in _links(store, group, commit):
            if link in asked and key not in out:
                gone.discard(link)
                if link in before.links:
                    keys.setdefault(commit.shard, set()).add(key)
        progress(number, total)
    out = {shard: frozenset(found) for shard, found in keys.items()}
    return Known(out, before.links | gone)


def find(
    store: Store,
    source: str,
    wanted: Known,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Trace]:
    """Every place below a source that holds something of what is wanted.

    Raises:
        SettingError: a commit cannot be read, so what it names cannot be told.
    """
    if not wanted:
        return
    groups = groups_in(store, source)
    for number, (shard, keys) in enumerate(sorted(wanted.keys.items()), 1):
        for group in groups:
            commit = read_commit(store, group, shard)
            if commit is not None:
                yield from in_shard(store, group, commit, keys)
        progress(number, len(wanted.keys))
    folder = layout.lists_folder(source)
    for name, rows in links_in_lists(store, source, wanted):
        yield Trace(f"{folder}/{name}", len(rows), "links")
    for path, keys in pages(store, source, wanted.every):
        yield Trace(path, len(keys), "dropped samples on a page or in a report")
    for garbage in prune.find(store, source):
        if count := len(garbage.files) + len(garbage.uploads):
            yield Trace(garbage.folder, count, "superseded files, which may hold some")


def in_shard(store: Store, group: str, commit: Commit, keys: frozenset[str]) -> Iterator[Trace]:
    """What a committed shard holds of these keys, file by file."""
    for name in sorted(commit.files):
        place = f"{group}/{name}"
        try:
            found = _in_file(store, group, commit, name, keys)
        except (BrokenShard, ValueError, KeyError, OSError) as error:
            text = " ".join(str(error).split())
            yield Trace(place, 1, f"file that cannot be read, so nothing is proven ({text})")
            continue
        if found:
            yield Trace(place, len(found), "dropped samples")


def _in_file(store: Store, group: str, commit: Commit, name: str, keys: frozenset[str]) -> set[str]:
    data = read_named(store, group, commit, name)
    if name.endswith(".parquet"):
        table = from_parquet(data)
        found = keys & set(table["key"].to_pylist())
        for column in NOTES & set(table.column_names):
            found |= {key for text in table[column].to_pylist() for key in mentioned(text, keys)}
        return set(found)
    if name.endswith(".tar"):
        return {key for key, _ in read_samples(data) if key in keys}
    if commit.index is None:
        raise BrokenShard(f"{name} is in its commit, and no index entry of it")
    header, samples = decode_shard(unpack(data, commit.index), ["key"])
    if "key" in header["column_names"]:
        return {sample["key"] for sample in samples if sample["key"] in keys}
    # Captions, and the official layout, have no keys: what no key points at is nobody's.
    rows = from_parquet(read_file(store, group, commit, ".parquet"))["row"].to_pylist()
    return {str(row) for row in set(range(commit.index["samples"])) - set(rows)}


def links_in_lists(store: Store, source: str, wanted: Known) -> Iterator[tuple[str, list[int]]]:
    """(file of `<source>/lists/`, its rows that are wanted): by their link, or as a sample of the
    shard that was made of them."""
    folder, group = layout.lists_folder(source), layout.images_group(source)
    names = [name for name in store.names(folder) if name.endswith(".parquet")]
    shards: dict[str, list[str]] = {}
    for shard in wanted.keys if names else ():
        commit = read_commit(store, group, shard)
        spec = commit.inputs.get("shard", [None, None, []])[2] if commit else []
        if spec:
            shards.setdefault(f"{spec[0]}.parquet", []).append(shard)
    for name in names:
        keys = {shard: wanted.keys[shard] for shard in shards.get(name, ())}
        if rows := url_lists.rows_to_blank(store, f"{folder}/{name}", keys, wanted.links):
            yield name, rows


def pages(store: Store, source: str, keys: Collection[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """(path, keys) of the pages, reports and notes of failures that name some of the keys."""
    folders = [f"{source}/runs", *(f"{group}/failures" for group in groups_in(store, source))]
    for folder in folders:
        for entry in store.walk(folder):
            if entry.path.endswith((".html", ".json")):
                text = store.read(entry.path).decode("utf-8", "replace")
                if found := named(entry.path, text, frozenset(keys)):
                    yield entry.path, found


def named(path: str, text: str, keys: frozenset[str]) -> frozenset[str]:
    """The keys that a page shows, or that a report's failures name."""
    if not path.endswith(".html"):
        return mentioned(" ".join(_errors(text)), keys)
    shown = [html.unescape(found[1]) for found in _FIGURE.finditer(text)]
    shown += [html.unescape(found[1]) for found in _UNREAD.finditer(text)]
    return keys & frozenset(shown)


def without_figures(text: str, keys: frozenset[str]) -> str:
    """A page without the pictures of these keys."""

    def kept(found: re.Match[str]) -> str:
        return "" if html.unescape(found[1]) in keys else found[0]

    return _UNREAD.sub(kept, _FIGURE.sub(kept, text))


def mentioned(text: str | None, keys: frozenset[str]) -> frozenset[str]:
    """The keys that a sentence has among its words."""
    return keys & set(_WORD.findall(text or ""))


def without_names(text: str, keys: frozenset[str]) -> str:
    """A sentence that names none of the keys."""
    return _WORD.sub(lambda found: "(dropped)" if found[0] in keys else found[0], text)


def _errors(text: str) -> list[str]:
    """What a run's report, or a note of a failure, says of what went wrong."""
    import json

    try:
        record = json.loads(text)
        return [*map(str, record.get("failures", {}).values()), str(record.get("error", ""))]
    except (ValueError, AttributeError):
        return [text]


def _links(store: Store, group: str, commit: Commit) -> Iterator[tuple[str, str]]:
    """(key, hash of its link) of every row of a shard of pictures."""
    try:
        table = from_parquet(read_file(store, group, commit, ".parquet"))
    except (BrokenShard, pa.ArrowInvalid):
        return  # said where the shard is looked at itself
    table = table.filter(pc.is_valid(table["url"]))  # pyright: ignore
    links = canonical_links(table["url"]).to_pylist()
    for key, link in zip(table["key"].to_pylist(), links, strict=True):
        yield key, drops.hash_of(link)

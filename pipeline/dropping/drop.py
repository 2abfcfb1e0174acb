"""`pipeline drop`: samples taken out by key or URL, wherever their shards are.

Readers leave them out at once; their bytes go with `pipeline.dropping.purge`.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import drops, layout, urls
from pipeline.core.commits import Commit, read_commit, read_file
from pipeline.core.errors import BrokenShard
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.engine.inventory import groups_of
from pipeline.sources.tables import url_lists

PREFIX = 5  # digits of a key that name its shard, in img2dataset's convention
NEAR = 0.4  # a text that is less like an entry is not named

_FORMS = {"key": urls.canonical_keys, "url": urls.canonical_links}  # of a column
_FORM = {"key": urls.canonical_key, "url": urls.canonical}  # of an entry


@dataclass
class Found:
    """What the entries of a list are, in one source."""

    new: dict[str, set[str]] = field(default_factory=dict)  # shard -> keys that are out now
    before: dict[str, set[str]] = field(default_factory=dict)  # and those that were out already
    matched: set[str] = field(default_factory=set)  # entries
    gone: set[str] = field(default_factory=set)  # entries of an earlier takedown, purged since
    listed: set[str] = field(default_factory=set)  # links of a list that are not downloaded yet

    def count(self, keys: dict[str, set[str]]) -> int:
        return sum(map(len, keys.values()))


def read_list(lines: Iterable[str]) -> list[str]:
    """One entry a line, each once; "#" begins a comment, blank lines do not count.

    A "#" within a URL is part of it: a comment has the line to itself or a space before it.
    """
    seen = map(urls.stripped, lines)  # Windows begins a file with a byte order mark
    entries = (urls.stripped(re.split(r"\s#", line)[0]) for line in seen if line[:1] != "#")
    return list(dict.fromkeys(entry for entry in entries if entry))


def drop(
    store: Store,
    source: str,
    entries: list[str],
    column: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Takes samples of a source out.

    Keys and URLs are compared in their canonical form (`pipeline.core.urls`).

    Args:
        entries: keys or URLs.
        column: "key" or "url": what the entries are.
        progress: called with (shards searched, of how many).

    Returns:
        What was found; entries that are not in `matched` are in no shard.
    """
    search = _Search(store, source, column, entries)
    if column == "key":
        search.dropped()
        search.by_prefix()
    search.everywhere(progress)
    found = search.found
    links = set() if column == "key" else search.links()
    if found.new or found.listed:
        keys = {shard: sorted(keys) for shard, keys in found.new.items()}
        drops.add(store, source, keys, links)
    return found


@dataclass(frozen=True)
class Near:
    """What is most like an entry that is in no shard."""

    text: str  # a key or a link
    key: str
    likeness: float  # share of their letters that agree, from both ends


def nearest(
    store: Store,
    source: str,
    entries: list[str],
    column: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Near]:
    """Entry -> what comes nearest to it, where anything comes near.

    Compares without case, and links without scheme and "www.".
    """
    found: dict[str, Near] = {}
    search = _Search(store, source, column, entries)
    wanted = {entry: _loose(pa.chunked_array([[entry]]), column)[0].as_py() for entry in entries}
    for number, shard in enumerate(search.shards, 1):
        for table in search.tables(shard):
            known = table.filter(pc.is_valid(table[column]))  # pyright: ignore
            _compare(known, column, wanted, found)
        progress(number, len(search.shards))
    return found


def _loose(texts: pa.ChunkedArray, column: str) -> pa.ChunkedArray:
    lower = pc.utf8_lower(_FORMS[column](texts))  # pyright: ignore
    return pc.replace_substring_regex(lower, r"^https?://(www\.)?", "")  # pyright: ignore


def _compare(table: pa.Table, column: str, wanted: dict[str, str], found: dict[str, Near]) -> None:
    """Of a sorted list the neighbours have the longest common beginning: no row is compared."""
    texts = _loose(table[column], column).to_pylist()
    for backwards in (False, True):
        order = sorted((text[::-1] if backwards else text, n) for n, text in enumerate(texts))
        for entry, loose in wanted.items():
            place = bisect.bisect(order, (loose[::-1] if backwards else loose, -1))
            for _, row in order[max(0, place - 1) : place + 1]:
                like = _likeness(loose, texts[row])
                if like >= NEAR and (entry not in found or like > found[entry].likeness):
                    text, key = (table[name][row].as_py() for name in (column, "key"))
                    found[entry] = Near(text, key, like)


def _likeness(one: str, other: str) -> float:
    begin = _agree(one, other)
    end = _agree(one[begin:][::-1], other[begin:][::-1])
    return (begin + end) / max(len(one), len(other), 1)


def _agree(one: str, other: str) -> int:
    """Letters that two texts have in common at their beginnings."""
    shorter = min(len(one), len(other))
    return next((n for n in range(shorter) if one[n] != other[n]), shorter)


class _Search:
    def __init__(self, store: Store, source: str, column: str, entries: list[str]) -> None:
        self.store, self.source, self.column = store, source, column
        self.entries: dict[str, list[str]] = {}  # form -> as the list spells it
        for entry in entries:
            self.entries.setdefault(_FORM[column](entry), []).append(entry)
        self.left = set(self.entries)  # a key is in one shard; a URL may be in several
        self.out = drops.read(store, source)
        self.found = Found()
        images = layout.images_group(source)
        made = (f"{source}/{g}" for g in groups_of(store, source))
        # Pictures first: their parquets have every key, and they alone have URLs.
        self.groups = [images] + [g for g in made if g != images and column == "key"]
        self.shards = sorted(
            {n.removesuffix(".json") for g in self.groups for n in store.names(f"{g}/commits")}
        )

    def dropped(self) -> None:
        """Keys that a list names already: their shards may have been made anew without them."""
        for shard, keys in self.out.items():
            for key in keys:
                if (form := urls.canonical_key(key)) in self.left:
                    self._match(shard, key, form)

    def links(self) -> set[str]:
        """The hashes of links that are found, those of a list that no shard has included; others
        that were taken down before count as gone."""
        known = drops.read_links(self.store, self.source)
        hashes = {drops.link_hash(form): entries for form, entries in self.entries.items()}
        left = {h for h, entries in hashes.items() if entries[0] not in self.found.matched}
        for found in left & known:
            self.found.gone.update(hashes[found])
        listed = url_lists.find_links(self.store, self.source, left - known)
        for found in listed:
            self.found.listed.update(hashes[found])
        return (hashes.keys() - left) | listed

    def by_prefix(self) -> None:
        """Keys that begin with the name of their shard."""
        by_shard: dict[str, list[str]] = {}
        for key in sorted(self.left):
            by_shard.setdefault(key[:PREFIX], []).append(key)
        for shard in sorted(by_shard.keys() & set(self.shards)):
            self._look(shard, pa.array(by_shard[shard], pa.string()))

    def everywhere(self, progress: Callable[[int, int], None]) -> None:
        """Every shard: first its pictures, then what was made of them."""
        wanted = pa.array(sorted(self.left), pa.string())
        for number, shard in enumerate(self.shards, 1):
            if not self.left:
                return
            self._look(shard, wanted)
            progress(number, len(self.shards))

    def _look(self, shard: str, wanted: pa.Array) -> None:
        for table in self.tables(shard):
            forms = _FORMS[self.column](table[self.column])
            hit = pc.is_in(forms, value_set=wanted)  # pyright: ignore
            keys = table["key"].filter(hit).to_pylist()
            for key, form in zip(keys, forms.filter(hit).to_pylist(), strict=True):
                self._match(shard, key, form)

    def tables(self, shard: str) -> Iterator[pa.Table]:
        """The parquets with a shard's keys: of its pictures, and of the groups made of them.

        Where a picture is gone or was made anew, a latent of it may still be there.
        """
        for group in self.groups:
            commit = read_commit(self.store, group, shard)
            table = None if commit is None else self._table(group, commit)
            if table is not None:
                yield table
            if not self.left:
                return

    def _table(self, group: str, commit: Commit) -> pa.Table | None:
        try:
            return from_parquet(read_file(self.store, group, commit, ".parquet"))
        except (BrokenShard, KeyError):
            return None  # `pipeline verify` says so; the other groups have the keys as well

    def _match(self, shard: str, key: str, form: str) -> None:
        before = key in self.out.get(shard, frozenset())
        found = self.found.before if before else self.found.new
        found.setdefault(shard, set()).add(key)
        self.found.matched.update(self.entries[form])
        if self.column == "key":
            self.left.discard(form)


def describe(source: str, found: Found) -> list[str]:
    """Lines for the user: what is out, and what is left to do for the bytes to go."""
    new, before = found.count(found.new), found.count(found.before)
    shards = Counter({shard: len(keys) for shard, keys in found.new.items()})
    some = ", ".join(f"{shard}: {count}" for shard, count in sorted(shards.items())[:10])
    more = ", …" if len(shards) > 10 else ""
    detail = f" ({some}{more})" if new else ""
    lines = [
        f"{source}: {new} samples of {len(shards)} shards are out now{detail}, "
        f"{before} were out already"
        + (f", {len(found.gone)} entries were purged" if found.gone else "")
        + (f", {len(found.listed)} links are not downloaded yet" if found.listed else "")
    ]
    if new or before or found.listed:
        lines.append(
            "  training leaves them out from its next start; their bytes go with `pipeline drop "
            f"--purge --source {source}`, from every group, page and list; or only from the groups "
            f"that the YAML names with `pipeline run all --source {source} --stale`, then "
            f"`pipeline prune --source {source}`"
        )
    return lines

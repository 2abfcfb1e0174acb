"""`pipeline drop --purge`: the bytes of dropped samples removed from all that a source holds.

No stage runs and no weights are loaded: what is left of a shard is copied, so groups that no YAML
names and encoders that this machine has not are purged like all others. The order makes it
resumable: links and lists first, while the pictures' parquets still tell them; each shard's data
before its commits, and those from the last made to the first (`pipeline.dropping.purge_shard`);
indexes, then pages, then files that no commit names any more. The same command goes on where one
was killed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.core import drops, facts, layout
from pipeline.core.errors import BrokenShard
from pipeline.core.groups import publish
from pipeline.core.store import Store, canonical_json, size
from pipeline.dropping import prune, traces
from pipeline.dropping.purge_shard import purge_shard
from pipeline.dropping.traces import Known, groups_in
from pipeline.sources.tables import url_lists


@dataclass
class Purged:
    """What was done to a source."""

    removed: Counter[str] = field(default_factory=Counter)  # "samples of GROUP", … -> how many
    broken: dict[str, str] = field(default_factory=dict)  # shard -> why it is as it was


def purge(
    store: Store,
    source: str,
    wanted: Known,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Purged:
    """Removes what is wanted from every group, list, page and report of a source, and all files
    that no commit names. The caller holds the leases of its groups.

    Args:
        wanted: of `traces.learn`.
        progress: called with (shards done, of how many).
    """
    found = Purged()
    done = found.removed
    _note(store, source, wanted)
    for name, rows in traces.links_in_lists(store, source, wanted):
        url_lists.blank(store, f"{layout.lists_folder(source)}/{name}", rows)
        done[f"links of {layout.lists_folder(source)}"] += len(rows)
    groups = groups_in(store, source)
    for number, (shard, keys) in enumerate(sorted(wanted.keys.items()), 1):
        try:
            for group, count in purge_shard(store, groups, shard, keys).items():
                done[f"samples of {group}"] += count
        except BrokenShard as error:
            found.broken[shard] = str(error)
        progress(number, len(wanted.keys))
    for group in groups:
        _publish(store, group)
    for path, keys in traces.pages(store, source, wanted.every):
        _mend_page(store, path, keys)
        done["pages and reports"] += 1
    garbage = prune.find(store, source)
    prune.delete(store, garbage)
    if files := sum(len(folder.files) for folder in garbage):
        freed = size(sum(folder.bytes for folder in garbage))
        done[f"superseded files, {freed}"] += files
    return found


def _note(store: Store, source: str, wanted: Known) -> None:
    """What the pictures' parquets told, written down before they are rewritten."""
    before = traces.known(store, source)
    new = {
        shard: sorted(keys - before.keys.get(shard, frozenset()))
        for shard, keys in wanted.keys.items()
    }
    new = {shard: keys for shard, keys in new.items() if keys}
    if new or wanted.links - before.links:
        drops.add(store, source, new, wanted.links - before.links)


def _publish(store: Store, group: str) -> None:
    """The index over the new shards; nothing where the group has never been published."""
    published = not facts.indexed(group) or store.exists(f"{group}/manifest.json")
    if published and store.names(f"{group}/commits"):
        publish(store, group)


def _mend_page(store: Store, path: str, keys: frozenset[str]) -> None:
    """A page without the pictures, a report whose errors name none of them; where that cannot be
    done, neither page nor report."""
    text = store.read(path).decode("utf-8", "replace")
    if path.endswith(".html"):
        text = traces.without_figures(text, keys)
    else:
        text = _without_names(text, keys)
    if text and not traces.named(path, text, keys):
        store.write(path, text.encode())
    else:
        store.delete(path)


def _without_names(text: str, keys: frozenset[str]) -> str:
    """A report, or a note of a failure; "" where it is none."""
    try:
        record = json.loads(text)
        for shard, error in record.get("failures", {}).items():
            record["failures"][shard] = traces.without_names(error, keys)
        if "error" in record:
            record["error"] = traces.without_names(record["error"], keys)
    except (ValueError, AttributeError, TypeError):
        return ""
    return canonical_json(record, indent=1).decode() + "\n"

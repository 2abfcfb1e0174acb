"""Which caption a picture trains with: one captioner, or a seeded draw from a weighted mix; of
several captions by one captioner, a seeded draw again."""

from __future__ import annotations

import hashlib

from pipeline.core import layout
from pipeline.core.catalog import Catalog, Head
from pipeline.core.commits import Commit, read_commit, read_file
from pipeline.core.errors import BrokenShard, SettingError
from pipeline.core.mix import Mix
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.stages.images import read_alt_captions

ALT = "alt"  # the source's own captions


def upstream(catalog: Catalog, source: str, mix: Mix, images: dict[str, Head]) -> dict[str, dict]:
    """Shard -> {captioner: content of its captions}; only shards that every captioner has.

    Raises:
        SettingError: a captioner of the mix has captioned nothing of this source.
    """
    by_captioner: dict[str, dict[str, str]] = {}
    for name in mix.weights:
        if name == ALT:
            commits = images
        else:
            commits = catalog.heads(layout.captions_group(source, name))
            if not commits and images:
                there = catalog.store.folders(f"{source}/captions")
                others = f"; captions are there by {', '.join(there)}" if there else ""
                raise SettingError(
                    f"captions: {name!r} has captioned nothing of {source}; run `pipeline run "
                    f"caption --source {source}` with the captioner and settings that this names"
                    f"{others}"
                )
        by_captioner[name] = {shard: head.content for shard, head in commits.items()}
    return {
        shard: {name: found[shard] for name, found in by_captioner.items()}
        for shard in images
        if all(shard in found for found in by_captioner.values())
    }


def chosen_captions(
    store: Store, source: str, mix: Mix, seed: int, images: Commit, made: dict[str, str]
) -> dict[str, str]:
    """key -> caption for every picture of the shard, in order of key; "" where there is none.

    Of several captions by the drawn captioner, (seed, key) draw one.

    Args:
        images: the commit of the shard's pictures.
        made: captioner -> content of its captions that the job was planned with.

    Raises:
        BrokenShard: captions were redone meanwhile, or are not what was committed.
    """
    alt = read_alt_captions(store, layout.images_group(source), images)
    tables: dict[str, dict[str, list[str]]] = {ALT: {key: [text] for key, text in alt.items()}}
    for name in mix.weights:
        if name != ALT:
            group = layout.captions_group(source, name)
            commit = read_commit(store, group, images.shard)
            if commit is None or commit.content() != made[name]:
                raise BrokenShard(f"{group}/{images.shard} was redone while this run went on")
            table = from_parquet(read_file(store, group, commit, ".parquet"))
            found = tables[name] = {}
            for row in table.select(["key", "caption"]).to_pylist():  # in order of number
                found.setdefault(row["key"], []).append(row["caption"] or "")
    return {
        key: one_of(tables[mix.draw(seed, key)].get(key, []), seed, key).strip()
        for key in sorted(alt)
    }


def one_of(captions: list[str], seed: int, key: str) -> str:
    """One of a picture's captions, a function of (seed, key) alone; "" where there are none."""
    if len(captions) < 2:
        return "".join(captions)
    digest = hashlib.sha256(f"number:{seed}:{key}".encode()).digest()
    return captions[int.from_bytes(digest[:8], "big") * len(captions) >> 64]

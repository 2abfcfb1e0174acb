"""The images group: how pictures are written and read back (img2dataset's convention)."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import pyarrow as pa

from pipeline.core.commits import (
    MAX_REJECT_RATE,
    Commit,
    check_rejects,
    plain_stem,
    read_commit,
    read_file,
    write_shard,
)
from pipeline.core.errors import BrokenShard
from pipeline.core.rules import readable
from pipeline.core.samples import FAILED, ImageRef, ImageSample, InputShard, Reject
from pipeline.core.staged_file import staged_file
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet, to_parquet
from pipeline.core.tars import read_samples, write_tar

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
REJECTED_CAPTION = 1000  # characters that are kept of a reject's caption


@dataclass(frozen=True)
class StoredImage:
    """A picture as it lies in a tar."""

    key: str
    data: bytes
    caption: str


def write_images(
    store: Store,
    group: str,
    shard: InputShard,
    inputs: dict[str, Any],
    items: Iterable[ImageSample | Reject],
    started: float,
    max_reject_rate: float = MAX_REJECT_RATE,
    reads_as: str = "",
) -> Commit:
    """NNNNN.tar (key.png, key.txt, key.json), NNNNN.parquet, NNNNN_stats.json, then the commit.

    One picture at a time is in memory. The stats file holds times, so no commit names it and
    nothing depends on it.

    Args:
        reads_as: content of the generation whose pictures and captions these are, in other bytes.
    """
    rows: list[dict[str, Any]] = []
    keys: list[str] = []
    rejects: list[Reject] = []

    def members() -> Iterator[tuple[str, bytes]]:
        for item in items:
            if isinstance(item, Reject):
                rejects.append(item)
                rows.append(_reject_row(item))
                continue
            row = _row(item, shard.split)
            rows.append(row)
            keys.append(item.ref.key)
            yield f"{item.ref.key}.{item.extension}", item.data
            yield f"{item.ref.key}.txt", item.ref.caption.encode()
            yield f"{item.ref.key}.json", json.dumps(row, sort_keys=True).encode()

    with staged_file(store, group) as tar:
        write_tar(cast(IO[bytes], tar), members())
        tar.close()
        rows.sort(key=lambda row: row["key"])
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        files = {".tar": tar, ".parquet": to_parquet(table)}
        stem = plain_stem(store, group, shard.id, files)
        # Before the commit, or a run that dies between the two never writes the stats.
        check_rejects(rejects, len(keys), max_reject_rate)
        store.write_json(f"{group}/{stem}_stats.json", _stats(len(keys), rejects, started))
        return write_shard(
            store,
            group,
            shard,
            inputs,
            files={stem + ending: data for ending, data in files.items()},
            keys=keys,
            rejects=rejects,
            max_reject_rate=max_reject_rate,
            reads_as=reads_as,
        )


def _reject_row(reject: Reject) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": reject.key,
        "status": reject.reason,
        "error_message": reject.detail,
    }
    if reject.ref is not None:
        row["url"] = readable(reject.ref.url) or None
        row["caption"] = readable(readable(reject.ref.caption)[:REJECTED_CAPTION]) or None
    return row


def _row(sample: ImageSample, split: str) -> dict[str, Any]:
    row = {
        "url": sample.ref.url,
        "caption": sample.ref.caption,
        "key": sample.ref.key,
        "status": "success",
        "error_message": None,
        "width": sample.width,
        "height": sample.height,
        "original_width": sample.original_width,
        "original_height": sample.original_height,
        "exif": None,
        "sha256": sample.sha256,
        "split": split,
    }
    if sample.ref.references:
        row["references"] = list(sample.ref.references)
    return row


def _stats(successes: int, rejects: list[Reject], started: float) -> dict[str, Any]:
    """img2dataset's: by its words, what came but was not kept failed to resize."""
    ended = time.time()
    failed = sum(reject.reason == FAILED for reject in rejects)
    return {
        "count": successes + len(rejects),
        "successes": successes,
        "failed_to_download": failed,
        "failed_to_resize": len(rejects) - failed,
        "duration": ended - started,
        "start_time": started,
        "end_time": ended,
        "status_dict": {"success": successes, **Counter(reject.reason for reject in rejects)},
    }


def images_commit(store: Store, group: str, shard: str, content: str) -> Commit:
    """The commit of a shard's pictures, which must still be the one the job was planned with.

    Raises:
        BrokenShard: it is gone, or another.
    """
    commit = read_commit(store, group, shard)
    if commit is None or commit.content() != content:
        raise BrokenShard(f"{group}/{shard} was redone while this run went on; run it again")
    return commit


def read_images(store: Store, group: str, commit: Commit) -> Iterator[StoredImage]:
    """The pictures of a committed shard, in the tar's order; captions from the tar."""
    for key, fields in read_samples(read_file(store, group, commit, ".tar")):
        image = stored_image(key, fields)
        if image is not None:
            yield image


def stored_image(key: str, fields: dict[str, bytes]) -> StoredImage | None:
    """A tar's members of one key as a picture; None where there is none among them."""
    data = next((fields[e] for e in IMAGE_EXTENSIONS if e in fields), None)
    return None if data is None else StoredImage(key, data, fields.get("txt", b"").decode())


def read_alt_captions(store: Store, group: str, commit: Commit) -> dict[str, str]:
    """key -> the source's own caption, from the shard's parquet (no tar is read)."""
    table = from_parquet(read_file(store, group, commit, ".parquet"))
    rows = table.select(["key", "caption", "status"]).to_pylist()
    return {row["key"]: row["caption"] or "" for row in rows if row["status"] == "success"}


_SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
        ("split", pa.string()),
        ("references", pa.list_(pa.string())),
    ]
)


def stored_samples(store: Store, group: str, commit: Commit) -> Iterator[ImageSample]:
    """A committed shard's pictures as they were made, in the tar's order, one at a time."""
    rows = {row["key"]: row for row in _stored_rows(store, group, commit)}
    for key, fields in read_samples(read_file(store, group, commit, ".tar")):
        row = rows[key]
        extension = next(e for e in IMAGE_EXTENSIONS if e in fields)
        sizes = (row[n] for n in ("width", "height", "original_width", "original_height"))
        ref = ImageRef(key, row["url"], row["caption"], tuple(row.get("references") or ()))
        yield ImageSample(ref, fields[extension], extension, *sizes)


def stored_rejects(store: Store, group: str, commit: Commit) -> list[Reject]:
    """A committed shard's rejects, in order of key; `max_reject_rate` has judged them by then, or a
    takedown of what is left beside them would fail."""
    return [
        Reject(
            row["key"],
            commit.inputs["stage"],
            row["status"],
            row["error_message"],
            ImageRef(row["key"], row["url"] or "", row["caption"] or ""),
            foreseen=True,
        )
        for row in _stored_rows(store, group, commit)
        if row["status"] != "success"
    ]


def _stored_rows(store: Store, group: str, commit: Commit) -> list[dict[str, Any]]:
    return from_parquet(read_file(store, group, commit, ".parquet")).to_pylist()


def placed(store: Store, group: str, commit: Commit, rejects: list[Reject]) -> list[Reject]:
    """Rejects of a stage that read this shard's pictures, with where each picture came from."""
    if not any(reject.ref is None for reject in rejects):
        return rejects
    table = from_parquet(read_file(store, group, commit, ".parquet")).select(["key", "url"])
    urls = dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return [replace(r, ref=r.ref or ImageRef(r.key, urls.get(r.key) or "", "")) for r in rejects]

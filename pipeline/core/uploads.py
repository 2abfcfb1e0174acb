"""Multipart uploads to S3 that nobody will complete: they are paid for and no listing shows them.

A worker that is killed in the middle of a large PUT leaves one behind. Other stores have none that
fsspec tells of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.core.store import Store


class Upload(NamedTuple):
    path: str  # of the file it was to become, relative to the root
    id: str


def unfinished(store: Store, folder: str) -> list[Upload]:
    """The uploads under way below a folder, those of living processes included."""
    if not _is_s3(store):
        return []
    return sorted(_listed(store, folder))


def abort(store: Store, upload: Upload) -> None:
    """Frees the parts that were sent; nothing happens where it is gone."""
    bucket, prefix = _place(store, upload.path)
    with store.explained(upload.path, "write"):
        store._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=prefix, UploadId=upload.id)


def _listed(store: Store, folder: str) -> Iterator[Upload]:
    bucket, prefix = _place(store, folder)
    _, root = _place(store, "")
    marker: dict[str, str] = {}
    while True:
        with store.explained(folder, "read"):
            found = store._fs.call_s3(
                "list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **marker
            )
        for row in found.get("Uploads", []):
            yield Upload(row["Key"].removeprefix(root).lstrip("/"), row["UploadId"])
        if not found.get("IsTruncated"):
            return
        marker = {
            "KeyMarker": found["NextKeyMarker"],
            "UploadIdMarker": found["NextUploadIdMarker"],
        }


def _place(store: Store, path: str) -> tuple[str, str]:
    """Bucket and key."""
    bucket, _, key = store.url(path).split("://", 1)[1].partition("/")
    return bucket, key.rstrip("/")


def _is_s3(store: Store) -> bool:
    return store.root.startswith(("s3://", "s3a://"))

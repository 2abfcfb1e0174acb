"""Pictures of an archive whose captions lie elsewhere: what several sources share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pipeline.core.samples import ImageRef, InputShard, RawImage, Reject, sample_key
from pipeline.sources.files.archives import Member, is_hidden, is_picture, members

#: From a picture's file name: its caption, or (reason, detail) of a reject.
Describe = Callable[[str], str | tuple[str, str]]


def pictures(
    path: Path,
    url: str,
    shard: InputShard,
    describe: Describe,
    only: frozenset[str] | None,
    digits: int,
) -> Iterator[RawImage | Reject]:
    """Every picture of an archive, and every member that is refused, in the archive's order.

    Args:
        url: of the archive, as it is to stand in the shard's parquet: with no secrets.
        only: these keys.
        digits: of a picture's place in the archive, in its key.

    Raises:
        BrokenArchive: see pipeline.sources.files.archives.
    """
    index = 0
    for member in members(path, is_picture):
        if is_hidden(member.name) or not (member.reason or is_picture(member.name)):
            continue
        key = sample_key(shard.id, index, digits)
        index += 1
        if only is None or key in only:
            yield _sample(key, member, url, describe)


def _sample(key: str, member: Member, url: str, describe: Describe) -> RawImage | Reject:
    where = f"{url}/{member.name.removeprefix('./')}"
    ref = ImageRef(key, where, "")
    if member.reason:
        return Reject(key, "download", member.reason, member.detail, ref)
    caption = describe(PurePosixPath(member.name).name)
    if not isinstance(caption, str):
        return Reject(key, "download", *caption, ref)
    return RawImage(replace(ref, caption=caption), member.data)

"""WebDataset tars: the same members always give the same bytes (no times, no owners)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, cast


def write_tar(file: IO[bytes], members: Iterable[tuple[str, bytes]]) -> None:
    """(name, data) pairs as a tar, USTAR, every time stamp 0; one member at a time in memory."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o644
            tar.addfile(info, io.BytesIO(data))


def read_samples(data: bytes) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) in the tar's order; only regular files count."""
    key, fields = None, {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            stem, _, extension = member.name.partition(".")
            if stem != key and key is not None:
                yield key, fields
                fields = {}
            key = stem
            file = cast(IO[bytes], tar.extractfile(member))  # isfile() above
            fields[extension] = file.read()
    if key is not None:
        yield key, fields

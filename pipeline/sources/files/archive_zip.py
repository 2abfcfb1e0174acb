"""Members of a zip, in the order of its directory or as asked for."""

from __future__ import annotations

import lzma
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from pipeline.sources.files.archive_entry import (
    RATIO,
    BadMember,
    Entry,
    Problem,
    too_large,
)


def zip_members(path: Path, limit: int) -> Iterator[Entry]:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        overlapping = _overlapping(infos)
        for info in infos:
            if not info.filename or not info.is_dir():  # zipfile looks at a name's last letter
                problem = zip_problem(info) or too_large(info.file_size, limit)
                if info.header_offset in overlapping:
                    problem = "unsafe-member", "its bytes are those of another member as well"
                yield info.orig_filename, problem, lambda info=info: zip_data(archive, info)


def _overlapping(infos: list[zipfile.ZipInfo]) -> set[int]:
    """Offsets of members that share bytes: a small zip of any number of large files."""
    found, end, last = set(), 0, -1
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            found |= {info.header_offset, last}
        if info.header_offset + info.compress_size > end:
            end, last = info.header_offset + info.compress_size, info.header_offset
    return found


def zip_problem(info: zipfile.ZipInfo) -> Problem:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "unsafe-member", "a symbolic link"
    if kind not in (0, stat.S_IFREG):
        return "unsafe-member", "a device or named pipe"
    if info.flag_bits & 1:
        return "undecodable", "encrypted"
    packed, size = info.compress_size, info.file_size
    if size > 1 << 20 and size > RATIO * packed:
        return "too-large", f"expands more than {RATIO}-fold: a bomb"
    if packed > size + size // 100 + 1024:  # no compression makes a file larger than that
        return "too-large", f"{packed} packed bytes, and its entry says it has {size}"
    return None


def zip_data(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(info) as file:
            # No more than the size that was judged, even where there is more; then the checksum
            # of the whole cannot fit.
            data = file.read(info.file_size + 1)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        raise BadMember(str(error)) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise BadMember(str(error)) from None  # bz2's
    if len(data) != info.file_size:
        raise BadMember(f"{len(data)} bytes, its entry says {info.file_size}")
    return data

"""Members of a tar, plain or compressed, in a stream."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from pipeline.sources.files.archive_entry import (
    RATIO,
    RATIO_FROM,
    BrokenArchive,
    Entry,
    too_large,
)

HEADER_BYTES = 16 << 10  # a long name or a PAX header; parsing larger ones is slow on purpose
GLOBAL_HEADERS = 1000  # PAX records that hold for all members to come


def tar_members(path: Path, limit: int) -> Iterator[Entry]:
    with open_tar(path) as tar:
        for info in infos(tar):
            if info.isdir():
                continue
            kind = _KINDS.get(info.type, "a member of an unknown kind")
            if not info.isreg():
                problem = ("unsafe-member", kind)
            elif info.issparse():
                problem = ("unsafe-member", "a sparse file")
            else:
                problem = too_large(info.size, limit)
            yield info.name, problem, lambda info=info: _tar_data(tar, info)
        _require_end(tar)


def _require_end(tar: tarfile.TarFile) -> None:
    """Reads on to the file's last byte, where a compressed stream has its checksum.

    Zeros that a broken copy has left in the middle look like the end, but members follow them.
    """
    while block := tar.fileobj.read(tarfile.BLOCKSIZE):  # pyright: ignore
        if block.strip(b"\0"):
            with contextlib.suppress(tarfile.HeaderError):
                info = tarfile.TarInfo.frombuf(block, tar.encoding or "utf-8", tar.errors)
                raise BrokenArchive(
                    f"{info.name[:200]!r} follows its end: a copy with a hole, or several tars in "
                    "one file"
                )


def _tar_data(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = cast(IO[bytes], tar.extractfile(info))  # of a regular file there is one
    data = file.read()
    if len(data) != info.size:
        raise BrokenArchive(f"it breaks off in {info.name}")
    return data


_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}


def infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """A tar's members, of which tarfile itself would keep every one."""
    while (info := tar.next()) is not None:
        tar.members = []  # pyright: ignore
        if info.size < 0 or len(tar.pax_headers) > GLOBAL_HEADERS:
            raise BrokenArchive(f"a header without sense before {info.name}")
        yield info


class _StrictInfo(tarfile.TarInfo):
    """A header that has to be one. tarfile takes a damaged or missing one for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> tarfile.TarInfo:  # pyright: ignore
        block = tarfile_.fileobj.read(tarfile.BLOCKSIZE)
        try:
            info: Any = cls.frombuf(block, tarfile_.encoding, tarfile_.errors)
        except tarfile.EOFHeaderError:  # pyright: ignore
            raise  # zeros: the end that an archive has to have
        except tarfile.HeaderError as error:
            what = "breaks off" if len(block) < tarfile.BLOCKSIZE else "is damaged"
            raise BrokenArchive(f"it {what} ({error})") from None
        info.offset = tarfile_.fileobj.tell() - tarfile.BLOCKSIZE  # as tarfile's own does
        if info.type in _EXTENSIONS and not 0 <= info.size <= HEADER_BYTES:
            raise BrokenArchive(f"an extended header of {info.size} bytes")
        return info._proc_member(tarfile_)


_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


@contextlib.contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    magic = magic_of(path)
    opener = next((o for start, o in _COMPRESSIONS.items() if magic.startswith(start)), None)
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open(path, "rb"))
        if opener is None:
            yield stack.enter_context(tarfile.TarFile(fileobj=raw, tarinfo=_StrictInfo))
            return
        stream = cast(IO[bytes], _Expanded(raw, stack.enter_context(opener(raw))))
        tar = tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictInfo, bufsize=1 << 18)  # noqa: SIM115
        yield stack.enter_context(tar)


_COMPRESSIONS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}


class _Expanded:
    """A compressed file's content, as long as it is in proportion."""

    def __init__(self, raw: IO[bytes], stream: IO[bytes]) -> None:
        self._raw, self._stream, self._bytes = raw, stream, 0

    def read(self, count: int) -> bytes:
        data = self._stream.read(count)
        self._bytes += len(data)
        if self._bytes > RATIO_FROM and self._bytes > RATIO * self._raw.tell():
            raise BrokenArchive(f"it expands more than {RATIO}-fold: a bomb")
        return data


def magic_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)

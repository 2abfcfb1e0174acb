"""Members of tars and zips from anywhere, one by one, in memory: nothing is unpacked to disk.

A member that is no plain file of reasonable size and name is refused and the next one follows; an
archive that breaks off, or expands like a bomb, is an error.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

MEMBER_BYTES = 64 << 20  # a larger member is refused: that is all that is held in memory
HEADER_BYTES = 16 << 10  # a long name or a PAX header; parsing larger ones is slow on purpose
GLOBAL_HEADERS = 1000  # PAX records that hold for all members to come
RATIO = 200  # an archive that expands by more is a bomb; text comes to 20, and gzip's limit is 1030
RATIO_FROM = 64 << 20  # expanded bytes below which no ratio is a danger

#: What is a picture by its name. Not all can be decoded: those are rejected, not skipped.
PICTURES = frozenset(
    ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "heic", "jxl")
)

#: Never looked into, whatever they are: to load a pickle is to run it, and bombs come in layers.
PICKLES = frozenset(("pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib"))
ARCHIVES = frozenset(
    ("tar", "tgz", "gz", "bz2", "xz", "zip", "7z", "rar", "zst", "tbz", "txz", "jar", "whl")
)


class BrokenArchive(RuntimeError):
    """An archive that is not whole, not what it says, or a bomb; no sample of it is used."""


@dataclass(frozen=True)
class Member:
    """One file of an archive, or why it is none that can be used."""

    name: str
    data: bytes = b""  # empty where it was not wanted, or is refused
    reason: str = ""  # "unsafe-member", "too-large" or "undecodable", of one that is refused
    detail: str = ""


def members(
    path: Path,
    wanted: Callable[[str], bool] = lambda name: True,
    limit: int = MEMBER_BYTES,
    unique: bool = True,
) -> Iterator[Member]:
    """Every file of a tar (plain, gz, bz2, xz) or a zip, in the archive's order; no folders.

    Args:
        wanted: whether a member of this name is to be read; others come without their data.
        limit: bytes of the largest member.
        unique: refuse a name that was there before; costs memory for each name.

    Raises:
        BrokenArchive: it breaks off, is damaged, or is a bomb. What came before is not to be used.
    """
    seen: set[str] = set()
    read = _zip_members if _magic(path).startswith((b"PK\x03\x04", b"PK\x05\x06")) else _tar_members
    with _judged(path):
        for raw_name, problem, load in read(path, limit):
            name = readable(raw_name)
            problem = problem or _suspicious(name)
            if name in seen:
                problem = problem or ("unsafe-member", "the archive has another of this name")
            if unique:
                seen.add(name)
            yield _member(name, problem, load if wanted(name) else bytes)


def readable(name: str) -> str:
    """A name that is text: bytes of no known encoding as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def named(path: Path, wanted: Iterable[str], limit: int = MEMBER_BYTES) -> Iterator[Member | None]:
    """Members of a zip in the order asked for; None for one that it has not."""
    with _judged(path), zipfile.ZipFile(path) as archive:
        entries = {readable(info.orig_filename): info for info in archive.infolist()}
        for name in wanted:
            info = entries.get(name)
            if info is None:
                yield None
                continue
            problem = _zip_problem(info) or _too_large(info.file_size, limit)
            yield _member(name, problem, lambda info=info: _zip_data(archive, info))


def is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix[1:].lower() in PICTURES


def is_hidden(name: str) -> bool:
    """macOS leaves ._NAME beside each NAME."""
    return PurePosixPath(name).name.startswith(".")


def names(path: Path) -> Iterator[str]:
    """Names of the members that can be used: by the headers, where it is no compressed tar."""
    return (m.name for m in members(path, lambda name: False) if not m.reason)


@contextlib.contextmanager
def open_member(path: Path, chosen: Callable[[str], bool]) -> Iterator[IO[bytes]]:
    """The first usable member of a tar that is `chosen`, as a stream of any length.

    Raises:
        BrokenArchive: the archive is, or it has no such member.
    """
    with _judged(path), _open_tar(path) as (tar, _):
        for info in _infos(tar):
            if info.isreg() and not info.issparse() and chosen(info.name):
                yield cast(IO[bytes], tar.extractfile(info))
                return
    raise BrokenArchive(f"{path.name}: it has no member that is looked for")


class _BadMember(Exception):
    """One member cannot be read; those after it can."""


_Problem = tuple[str, str] | None  # reason and detail of a reject
_Entry = tuple[str, _Problem, Callable[[], bytes]]


def _member(name: str, problem: _Problem, load: Callable[[], bytes]) -> Member:
    """What is in a file of an archive, or why it is refused."""
    if problem is None:
        try:
            return Member(name, load())
        except _BadMember as error:
            problem = ("undecodable", str(error))
    return Member(name, b"", problem[0], f"{name[:200]!r}: {problem[1]}")


def _suspicious(name: str) -> _Problem:
    """Why nothing of this name is read."""
    if name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":"):
        return "unsafe-member", "an absolute name"
    if ".." in name.replace("\\", "/").split("/"):
        return "unsafe-member", "a name that leads out of the archive"
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        return "unsafe-member", "a name with control characters"
    ending = PurePosixPath(name).suffix[1:].lower()
    if ending in PICKLES:
        return "unsafe-member", "a pickle"
    if ending in ARCHIVES:
        return "unsafe-member", "an archive in the archive"
    return None


def _too_large(size: int, limit: int) -> _Problem:
    return ("too-large", f"{size} bytes, over {limit}") if size > limit else None


def _tar_members(path: Path, limit: int) -> Iterator[_Entry]:
    with _open_tar(path) as (tar, source):
        for info in _infos(tar):
            if info.isdir():
                continue
            kind = _KINDS.get(info.type, "a member of an unknown kind")
            if not info.isreg():
                problem = ("unsafe-member", kind)
            elif info.issparse():
                problem = ("unsafe-member", "a sparse file")
            else:
                problem = _too_large(info.size, limit)
            yield info.name, problem, lambda info=info: _tar_data(tar, info)
        while source is not None and source.read(1 << 20):
            pass  # to the end, where a compressed stream has its checksum


def _tar_data(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None  # a regular file
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


def _infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
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
def _open_tar(path: Path) -> Iterator[tuple[tarfile.TarFile, _Expanded | None]]:
    """The tar, and its expanded bytes where it is compressed."""
    magic = _magic(path)
    opener = next((o for start, o in _COMPRESSIONS.items() if magic.startswith(start)), None)
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open(path, "rb"))
        if opener is None:
            yield stack.enter_context(tarfile.TarFile(fileobj=raw, tarinfo=_StrictInfo)), None
            return
        source = _Expanded(raw, stack.enter_context(opener(raw)))
        stream = cast(IO[bytes], source)
        tar = tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictInfo, bufsize=1 << 18)  # noqa: SIM115
        yield stack.enter_context(tar), source


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


def _zip_members(path: Path, limit: int) -> Iterator[_Entry]:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        overlapping = _overlapping(infos)
        for info in infos:
            if not info.is_dir():
                problem = _zip_problem(info) or _too_large(info.file_size, limit)
                if info.header_offset in overlapping:
                    problem = "unsafe-member", "its bytes are those of another member as well"
                yield info.orig_filename, problem, lambda info=info: _zip_data(archive, info)


def _overlapping(infos: list[zipfile.ZipInfo]) -> set[int]:
    """Offsets of members that share bytes: a small zip of any number of large files."""
    found, end, last = set(), 0, -1
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            found |= {info.header_offset, last}
        if info.header_offset + info.compress_size > end:
            end, last = info.header_offset + info.compress_size, info.header_offset
    return found


def _zip_problem(info: zipfile.ZipInfo) -> _Problem:
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


def _zip_data(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(info) as file:
            # No more than the size that was judged, even where there is more; then the checksum
            # of the whole cannot fit.
            data = file.read(info.file_size + 1)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        raise _BadMember(str(error)) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _BadMember(str(error)) from None  # bz2's
    if len(data) != info.file_size:
        raise _BadMember(f"{len(data)} bytes, its entry says {info.file_size}")
    return data


def _magic(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


@contextlib.contextmanager
def _judged(path: Path) -> Iterator[None]:
    """What the libraries raise on archives that are none, as one error."""
    try:
        yield
    except BrokenArchive as error:
        name = path.name
        raise BrokenArchive(str(error) if name in str(error) else f"{name}: {error}") from None
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise BrokenArchive(f"{path.name}: {error or 'it breaks off'}") from None
    except (RecursionError, UnicodeError, OverflowError, ValueError) as error:
        raise BrokenArchive(f"{path.name}: {type(error).__name__}: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's
        raise BrokenArchive(f"{path.name}: {error}") from None  # gzip's and bz2's

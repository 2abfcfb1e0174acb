"""Members of tars and zips from anywhere, one by one, in memory: nothing is unpacked to disk.

A member that is no plain file of reasonable size and name is refused and the next one follows; an
archive that breaks off, or expands like a bomb, is an error.
"""

from __future__ import annotations

import contextlib
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from pipeline.sources.files.archive_entry import (
    MEMBER_BYTES,
    BadMember,
    BrokenArchive,
    Problem,
    too_large,
)
from pipeline.sources.files.archive_tar import infos, magic_of, open_tar, tar_members
from pipeline.sources.files.archive_zip import zip_data, zip_members, zip_problem

ZIP = (b"PK\x03\x04", b"PK\x05\x06")

#: What is a picture by its name. Not all can be decoded: those are rejected, not skipped.
PICTURES = frozenset(
    ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "heic", "jxl")
)

#: Never looked into, whatever they are: to load a pickle is to run it, and bombs come in layers.
PICKLES = frozenset(("pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib"))
ARCHIVES = frozenset(
    ("tar", "tgz", "gz", "bz2", "xz", "zip", "7z", "rar", "zst", "tbz", "txz", "jar", "whl")
)


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
    read = zip_members if magic_of(path).startswith(ZIP) else tar_members
    with _judged(path):
        for raw_name, problem, load in read(path, limit):
            name = readable(raw_name)
            problem = problem or _suspicious(raw_name)  # not by the \xNN of its text
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
            problem = zip_problem(info) or too_large(info.file_size, limit)
            yield _member(name, problem, lambda info=info: zip_data(archive, info))


def is_picture(name: str) -> bool:
    return _ending(name) in PICTURES


def is_hidden(name: str) -> bool:
    """macOS leaves ._NAME beside each NAME."""
    return name.rpartition("/")[2].startswith(".")


def names(path: Path) -> Iterator[str]:
    """Names of the members that can be used: by the headers, where it is no compressed tar."""
    return (m.name for m in members(path, lambda name: False) if not m.reason)


@contextlib.contextmanager
def open_member(path: Path, chosen: Callable[[str], bool]) -> Iterator[IO[bytes]]:
    """The first usable member of a tar that is `chosen`, as a stream of any length.

    Raises:
        BrokenArchive: the archive is, or it has no such member.
    """
    with _judged(path), open_tar(path) as tar:
        for info in infos(tar):
            if info.isreg() and not info.issparse() and chosen(info.name):
                yield cast(IO[bytes], tar.extractfile(info))
                return
    raise BrokenArchive(f"{path.name}: it has no member that is looked for")


def _member(name: str, problem: Problem, load: Callable[[], bytes]) -> Member:
    """What is in a file of an archive, or why it is refused."""
    if problem is None:
        try:
            return Member(name, load())
        except BadMember as error:
            problem = ("undecodable", str(error))
    return Member(name, b"", problem[0], f"{name[:200]!r}: {problem[1]}")


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _ending(name: str) -> str:
    """After the last dot; pathlib takes five times as long, and there are millions of names."""
    _, dot, ending = name.rpartition("/")[2].rpartition(".")
    return ending.lower() if dot else ""


def _suspicious(name: str) -> Problem:
    """Why nothing of this name is read."""
    if name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":"):
        return "unsafe-member", "an absolute name"
    if ".." in name.replace("\\", "/").split("/"):
        return "unsafe-member", "a name that leads out of the archive"
    if _CONTROL.search(name):
        return "unsafe-member", "a name with control characters"
    ending = _ending(name)
    if ending in PICKLES:
        return "unsafe-member", "a pickle"
    if ending in ARCHIVES:
        return "unsafe-member", "an archive in the archive"
    return None


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
    except (RecursionError, NotImplementedError, OverflowError, ValueError) as error:
        raise BrokenArchive(f"{path.name}: {type(error).__name__}: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's
        raise BrokenArchive(f"{path.name}: {error}") from None  # gzip's and bz2's

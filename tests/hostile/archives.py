"""Archives with members that should harm whoever unpacks them."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from tests.hostile.case import ERROR, SAMPLE, Case
from tests.hostile.pictures import jpeg, zeros

UNSAFE = "unsafe-member"


@dataclass(frozen=True)
class Archive(Case):
    """A case of several samples. `verdict` is that of what is its own; two good samples are
    around it, which must come."""

    alone: bool = False  # it has no good samples
    by_member: bool = False  # the verdict is on members; else the sample is judged, later


def _archive(
    name: str, verdict: str, why: str, make: Callable[[], bytes], alone: bool = False
) -> Archive:
    by_member = verdict not in (SAMPLE, ERROR, "no-caption") and not name.startswith(
        ("ungrouped", "broken-picture", "two-cases")
    )
    return Archive(name, verdict, why, make, alone, by_member)


def member(name: str, data: bytes = b"", **facts) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, data


def pair(stem: str, seed: int, caption: str = "a cat") -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{stem}.jpg", jpeg(seed)), member(f"{stem}.txt", caption.encode())]


def tar(*own: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of the case's own members between two good samples."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for info, data in [*pair("0000", 2000), *own, *pair("9999", 2001)]:
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, linkname=target, type=kind)


def zipped(write: Callable[[zipfile.ZipFile], None]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for stem, seed in (("0000", 2000), ("9999", 2001)):
            file.writestr(_named(f"{stem}.jpg"), jpeg(seed))
            file.writestr(_named(f"{stem}.txt"), "a cat")
        write(file)
    return buffer.getvalue()


def _named(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name)  # without the time


class _Harm:
    """What a pickle may do when it is opened."""

    def __reduce__(self):
        return (open, ("/tmp/microdit-hostile", "w"))


def gzip_bomb(size: int = 8 << 30) -> bytes:
    """A gzip stream of zeros whose tar header claims a picture of that size."""
    info = tarfile.TarInfo("0001.jpg")
    info.size = size
    head = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = head.compress(info.tobuf(tarfile.GNU_FORMAT)) + head.flush(zlib.Z_FULL_FLUSH)
    body = zeros(size)[2:-4]  # without zlib's own frame
    return b"\x1f\x8b\x08\0\0\0\0\0\2\xff" + start + body + struct.pack("<II", 0, size & 0xFFFFFFFF)


def bomb_in_zip(size: int) -> bytes:
    """A member that inflates to `size` zeros, and says so."""
    return _zip_of("0001.jpg", zeros(size)[2:-4], size)


def lying_zip(size: int) -> bytes:
    """The same, whose directory says 1,000 bytes."""
    return _zip_of("0001.jpg", zeros(size)[2:-4], 1000)


def _zip_of(name: str, packed: bytes, size: int) -> bytes:
    """A zip of one deflated member, of the size that it is to claim."""
    size, coded = min(size, 0xFFFFFFFE), name.encode()
    shared = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, 0, len(packed), size, len(coded), 0)
    local = b"PK\3\4" + shared + coded + packed
    central = b"PK\1\2" + struct.pack("<H", 20) + shared + struct.pack("<HHHII", 0, 0, 0, 0, 0)
    central += coded
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


def overlapping_zip(count: int = 200) -> bytes:
    """Many directory entries for one packed member of 10 MB: a bomb without nesting."""
    packed = zeros(10 << 20)[2:-4]
    single = _zip_of("0001.jpg", packed, 10 << 20)
    at = single.index(b"PK\1\2")
    local, entry = single[:at], single[at : single.index(b"PK\5\6")]
    names = [entry[:46] + f"{n:04d}.jpg".encode() for n in range(1, count + 1)]
    central = b"".join(names)
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(central), len(local), 0)
    return local + central + b"PK\5\6" + end


def truncated() -> bytes:
    data = tar(*pair("0001", 2002))
    return data[: len(data) // 2]


def endless(data: bytes) -> bytes:
    """A tar without the zeros that end it."""
    whole = len(data.rstrip(b"\0"))
    return data[: -(-whole // 512) * 512]


def sparse_header() -> bytes:
    """A member that claims 1 TB, in a tar of a few KB."""
    info = tarfile.TarInfo("0001.jpg")
    info.size = 1 << 40
    start = tar()
    return start[: len(start) // 2 // 512 * 512] + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def noise() -> bytes:
    import random

    return random.Random(0).randbytes(20_000)


def pax_size() -> bytes:
    """An extended header that says another size than the header it extends."""
    info = tarfile.TarInfo("0001.jpg")
    info.size = 10
    info.pax_headers = {"size": "999999999999"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as file:
        for good, data in pair("0000", 2000):
            file.addfile(good, io.BytesIO(data))
        file.addfile(info, io.BytesIO(bytes(10)))
    return buffer.getvalue()


def long_pax_name() -> bytes:
    """A name of 1 MB, which only an extended header can hold."""
    return tar(*pair("n" * (1 << 20), 2002))


CASES: list[Archive] = [
    # Names and kinds.
    _archive("traversal.tar", UNSAFE, "../../evil.jpg", lambda: tar(*pair("../../evil", 2002))),
    _archive("absolute.tar", UNSAFE, "/tmp/evil.jpg", lambda: tar(*pair("/tmp/evil", 2002))),
    _archive(
        "inner-traversal.tar", UNSAFE, "a/../../evil.jpg", lambda: tar(*pair("a/../../evil", 2002))
    ),
    _archive(
        "symlink.tar",
        UNSAFE,
        "a symbolic link to /etc/passwd",
        lambda: tar(link("0001.jpg", "/etc/passwd", tarfile.SYMTYPE), member("0001.txt", b"x")),
    ),
    _archive(
        "hardlink.tar",
        UNSAFE,
        "a hard link to a good member",
        lambda: tar(link("0001.jpg", "0000.jpg", tarfile.LNKTYPE), member("0001.txt", b"x")),
    ),
    _archive(
        "device.tar",
        UNSAFE,
        "a character device, 1:5 (/dev/zero)",
        lambda: tar(
            member("0001.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
            member("0001.txt", b"x"),
        ),
    ),
    _archive(
        "fifo.tar",
        UNSAFE,
        "a FIFO",
        lambda: tar(member("0001.jpg", type=tarfile.FIFOTYPE), member("0001.txt", b"x")),
    ),
    _archive(
        "duplicate.tar",
        UNSAFE,
        "a member's name twice, with another picture",
        lambda: tar(*pair("0001", 2002), *pair("0001", 2003)),
    ),
    _archive(
        "pickle.tar",
        UNSAFE,
        "a caption that is a pickle",
        lambda: tar(member("0001.jpg", jpeg(2002)), member("0001.pkl", pickle.dumps(_Harm()))),
    ),
    _archive("nested.tar", UNSAFE, "a tar in the tar", lambda: tar(member("0001.tar", tar()))),
    _archive(
        "nested-gzip.tar",
        UNSAFE,
        "a gzipped tar in the tar",
        lambda: tar(member("0001.tar.gz", gzip.compress(tar(), mtime=0))),
    ),
    # Sizes.
    _archive("gzip-bomb.tgz", ERROR, "8 GB of zeros in 8 MB", gzip_bomb),
    _archive("huge-member.tar", ERROR, "a member of 1 TB in a tar of 40 KB", sparse_header),
    _archive("pax-size.tar", ERROR, "an extended header that claims 1 TB", pax_size),
    _archive("long-name.tar", ERROR, "a name of 1 MB", long_pax_name),
    _archive(
        "bomb.zip",
        "too-large",
        "a member that inflates to 4 GB",
        lambda: bomb_in_zip(4 << 30),
        alone=True,
    ),
    _archive(
        "lying.zip",
        "too-large",
        "4 GB that the directory calls 1,000 bytes",
        lambda: lying_zip(4 << 30),
        alone=True,
    ),
    _archive(
        "overlapping.zip",
        UNSAFE,
        "200 entries for one packed member",
        overlapping_zip,
        alone=True,
    ),
    # Broken.
    _archive("truncated.tar", ERROR, "half of it", truncated),
    _archive(
        "no-end.tar",
        ERROR,
        "no closing blocks: what followed is missing, perhaps",
        lambda: endless(tar(*pair("0001", 2002))),
    ),
    _archive(
        "truncated.tgz",
        ERROR,
        "half of it, gzipped",
        lambda: gzip.compress(tar(*pair("0001", 2002)), mtime=0)[:30_000],
    ),
    _archive(
        "truncated.zip",
        ERROR,
        "half of it: the directory is missing",
        lambda: zipped(lambda file: None)[:20_000],
    ),
    _archive("noise.tar", ERROR, "random bytes", noise),
    _archive("empty.tar", ERROR, "no bytes", lambda: b""),
    _archive("html.tar", ERROR, "an error page", lambda: b"<html>expired</html>" * 200),
    _archive(
        "bad-checksum.tar",
        ERROR,
        "a header whose checksum is wrong",
        lambda: _corrupt(tar(*pair("0001", 2002))),
    ),
    # Odd, and good.
    _archive(
        "hole.tar",
        ERROR,
        "zeros for a header in the middle, as broken copies have them",
        lambda: _holed(tar(*pair("0001", 2002), *pair("0002", 2003))),
    ),
    _archive(
        "joined.tar",
        ERROR,
        "two tars in one file: the second one is behind the end",
        lambda: tar(*pair("0001", 2002)) + tar(*pair("0002", 2003)),
    ),
    _archive(
        "after-end.tar",
        SAMPLE,
        "noise behind the end",
        lambda: tar(*pair("0001", 2002)) + b"noise" * 999,
    ),
    _archive(
        "two-cases.tar",
        UNSAFE,
        "a sample with a .jpg and a .JPG: which is meant?",
        lambda: tar(*pair("0001", 2002), member("0001.JPG", jpeg(2003))),
    ),
    _archive(
        "ungrouped.tar",
        UNSAFE,
        "a sample whose two files lie apart",
        lambda: tar(member("0001.jpg", jpeg(2002)), *pair("0002", 2003), member("0001.txt", b"x")),
    ),
    _archive(
        "unicode.tar",
        SAMPLE,
        "composed, decomposed and right-to-left names",
        lambda: tar(*pair("café-cafe\u0301-\u202eabc", 2002)),
    ),
    _archive(
        "not-utf8.tar",
        SAMPLE,
        "a name in Latin-1",
        lambda: tar(*pair("caf\udce9", 2002), form=tarfile.GNU_FORMAT),
    ),
    _archive(
        "folders.tar",
        SAMPLE,
        "samples in folders",
        lambda: tar(member("a", type=tarfile.DIRTYPE), *pair("a/0001", 2002)),
    ),
    _archive(
        "dot-slash.tar", SAMPLE, "names that begin with ./", lambda: tar(*pair("./0001", 2002))
    ),
    _archive(
        "mac.tar",
        SAMPLE,
        "macOS resource forks beside the files",
        lambda: tar(member("._0001.jpg", b"\0\5\x16\7" + bytes(99)), *pair("0001", 2002)),
    ),
    _archive(
        "no-caption.tar",
        "no-caption",
        "a picture without a text",
        lambda: tar(member("0001.jpg", jpeg(2002))),
    ),
    _archive(
        "broken-picture.tar",
        "undecodable",
        "half of a JPEG",
        lambda: tar(member("0001.jpg", jpeg(2002)[:9000]), member("0001.txt", b"x")),
    ),
]


def _corrupt(data: bytes) -> bytes:
    at = data.index(b"0001.jpg")
    return data[:at] + b"X" + data[at + 1 :]


def _holed(data: bytes) -> bytes:
    at = data.index(b"0002.jpg")
    return data[:at] + bytes(tarfile.BLOCKSIZE) + data[at + tarfile.BLOCKSIZE :]

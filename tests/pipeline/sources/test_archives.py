"""Readers of tars and zips where tests/hostile does not look: compressions, order, odd headers."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from pipeline.sources.files.archives import BrokenArchive, members, named, names, open_member
from tests.pipeline.helpers import upstream

FILES = [("a/0.jpg", b"zero" * 999), ("a/0.txt", b"caption"), ("a/1.jpg", b"one" * 5000)]


def at(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packed", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_tar_by_what_it_is_and_not_by_its_name(tmp_path, packed):
    path = at(tmp_path / "x.bin", packed(upstream.tar(FILES)))
    assert [(m.name, m.data) for m in members(path)] == FILES
    assert list(names(path)) == [name for name, _ in FILES]
    some = list(members(path, lambda name: name.endswith(".txt")))
    assert [m.data for m in some] == [b"", b"caption", b""]


@pytest.mark.parametrize("packed", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("damage", ["cut at the end", "cut", "a changed byte"])
def test_a_compressed_tar_is_read_to_its_checksum(tmp_path, packed, damage):
    whole = packed(upstream.tar(FILES))
    broken = {
        "cut at the end": whole[:-5],
        "cut": whole[: len(whole) // 2],
        "a changed byte": whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:],
    }[damage]
    with pytest.raises(BrokenArchive, match=r"^x.tgz: "):
        list(members(at(tmp_path / "x.tgz", broken)))


def test_names_that_are_no_utf_8_are_no_paths(tmp_path):
    path = tmp_path / "latin.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("été.txt"))
    assert [(m.name, m.reason) for m in members(path)] == [("\\xe9t\\xe9.txt", "")]


def test_members_of_a_zip_in_the_order_asked_for(tmp_path):
    path = at(tmp_path / "x.zip", upstream.zipped(FILES))
    found = list(named(path, ["a/1.jpg", "none", "a/0.txt"]))
    assert [m and m.data for m in found] == [FILES[2][1], None, FILES[1][1]]
    (large,) = named(path, ["a/1.jpg"], limit=100)
    assert large is not None
    assert (large.reason, large.data) == ("too-large", b"")


def test_a_zip_of_a_version_that_there_is_not(tmp_path):
    data = bytearray(upstream.zipped(FILES))
    data[data.index(b"PK\1\2") + 6] = 99
    with pytest.raises(BrokenArchive, match=r"x.zip: .*version 9.9"):
        list(members(at(tmp_path / "x.zip", bytes(data))))


def test_a_zip_with_a_member_of_no_name(tmp_path):
    path = at(tmp_path / "x.zip", upstream.zipped([("\0.jpg", b"odd"), *FILES]))
    assert [m.name for m in members(path)][1:] == [name for name, _ in FILES]


def test_a_zip_with_links_and_passwords(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
        file.writestr("locked.jpg", "x")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # encrypted, says the directory
    found = list(members(at(path, bytes(data))))
    assert [m.reason for m in found] == ["unsafe-member", "undecodable"]
    assert not any(m.data for m in found)


def test_one_large_member_as_a_stream(tmp_path):
    lines = b"".join(b'{"n": %d}\n' % n for n in range(100_000))
    path = at(tmp_path / "x.tgz", upstream.tgz([("README", b"x"), ("all.jsonl", lines)]))
    with open_member(path, lambda name: name.endswith(".jsonl")) as file:
        assert sum(1 for _ in file) == 100_000
    with pytest.raises(BrokenArchive, match="no member"), open_member(path, lambda name: False):
        pass
    cut = at(tmp_path / "y.tgz", path.read_bytes()[:-20_000])
    with (
        pytest.raises(BrokenArchive, match=r"y.tgz"),
        open_member(cut, lambda name: name.endswith(".jsonl")) as file,
    ):
        file.read()


def test_a_bomb_behind_a_stream_is_stopped(tmp_path):
    path = at(tmp_path / "x.tgz", upstream.tgz([("all.jsonl", bytes(90 << 20))]))
    with (
        pytest.raises(BrokenArchive, match="more than 200-fold"),
        open_member(path, lambda name: True) as file,
    ):
        all(iter(lambda: file.read(1 << 20), b""))


def header(name: str, kind: bytes, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    padded = data + bytes(-len(data) % 512)
    return info.tobuf(tarfile.USTAR_FORMAT) + padded


def record(key: str, value: str) -> bytes:
    """A PAX record, whose length counts its own digits."""
    rest = f" {key}={value}\n"
    length = len(rest) + 1
    while len(f"{length}{rest}") != length:
        length = len(f"{length}{rest}")
    return f"{length}{rest}".encode()


def negative() -> bytes:
    info = tarfile.TarInfo("f")
    info.size = -512
    return info.tobuf(tarfile.GNU_FORMAT)


HEADERS = {
    "a chain of them": header("p", tarfile.XHDTYPE, record("comment", "x")) * 5000,
    "many for all": b"".join(
        header("g", tarfile.XGLTYPE, record(f"k{n}", "x")) + header("f", tarfile.REGTYPE, b"")
        for n in range(1100)
    ),
    "digits without end": header("p", tarfile.XHDTYPE, b"1" * (1 << 20)),
    "a negative size": negative(),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_made_to_be_slow_or_large(tmp_path, kind):
    buffer = io.BytesIO(HEADERS[kind] + upstream.tar(FILES))
    began = time.monotonic()
    with pytest.raises(BrokenArchive):
        list(members(at(tmp_path / "x.tar", buffer.getvalue())))
    assert time.monotonic() - began < 5

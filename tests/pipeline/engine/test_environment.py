"""What a process finds around it: CPUs, descriptors, streams, temporary folders, homes, disks."""

from __future__ import annotations

import codecs
import errno
import getpass
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.core import disk, limits
from pipeline.core.errors import SettingError
from pipeline.core.location import located
from pipeline.core.program import name_user
from pipeline.core.store import Store
from pipeline.core.temporary import LONGEST, socket_folder
from pipeline.core.text_files import read_yaml_text
from pipeline.sources.folder import Folder
from pipeline.sources.hf import HubDataset
from pipeline.sources.sa1b import SA1B
from pipeline.sources.urls import Urls
from tests.checkout import ROOT

# CPUs.

NONE = "12:cpu,cpuacct:/\n0::/\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (NONE, {}, 8),
        (NONE, {"cpu.max": "max 100000"}, 8),
        (NONE, {"cpu.max": "150000 100000"}, 2),  # part of a CPU counts as one
        (NONE, {"cpu.max": "10000 100000"}, 1),
        (NONE, {"unified/cpu.max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000"}, 2),
        (NONE, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        (NONE, {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        (
            "4:cpu,cpuacct:/docker/x\n",
            {
                "cpu,cpuacct/docker/x/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/docker/x/cpu.cfs_period_us": "50000",
            },
            1,
        ),
        (NONE, {"cpu.max": "odd"}, 8),
    ],
)
def test_cpus_of_a_cgroup(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cgroup: str,
    files: dict[str, str],
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert limits.usable_cpus(tmp_path / "cgroup", tmp_path / "sys") == expected


def test_cpus_of_an_affinity() -> None:
    (one, *_) = os.sched_getaffinity(0)
    found = run("from pipeline.core.limits import usable_cpus; print(usable_cpus())", cpus={one})
    assert found.stdout == "1\n"


def run(
    program: str, cpus: set[int] | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
    )


def test_the_soft_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append(limits))
    for soft, hard in ((1024, 4096), (1024, resource.RLIM_INFINITY), (1 << 20, 1 << 20)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, pair=(soft, hard): pair)
        limits.raise_open_files()
    assert asked == [(4096, 4096), (limits.OPEN_FILES, resource.RLIM_INFINITY)]


# Standard streams.

TALK = """
import sys
from pipeline.core.streams import survive_readers
survive_readers()
for line in range(5000):
    print(line, flush=True)
    print(line, file=sys.stderr)
open(sys.argv[1], "w").write("went on")
"""


@pytest.mark.parametrize("lost", ["| head -n 1", "2>&1 | head -n 1", ">&- 2>&-", "2>/dev/full"])
def test_a_program_outlives_its_readers(tmp_path: Path, lost: str) -> None:
    script, end = tmp_path / "talk.py", tmp_path / "end"
    script.write_text(TALK)
    command = f'{sys.executable} "{script}" "{end}" {lost}'
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=env, timeout=60
    )
    assert end.read_text() == "went on"
    assert "Error" not in found.stderr


def test_a_result_that_finds_no_room_is_an_error(tmp_path: Path) -> None:
    program = (
        "from pipeline.core.streams import survive_readers; survive_readers(); print('x' * 9, "
        "flush=True)"
    )
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert found.returncode
    assert "No space left" in found.stderr


# Temporary folders and sockets.


def test_sockets_fit_whatever_tmpdir_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("d" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert socket_folder(30) == "/tmp"
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert socket_folder(30) == "/tmp"
    with pytest.raises(SettingError, match="too long for a socket's path"):
        socket_folder(LONGEST)


def test_loaders_sockets_in_a_long_tmpdir(tmp_path: Path) -> None:
    long = tmp_path / ("d" * 100)
    long.mkdir()
    program = (
        "from pipeline.core.temporary import shorten_sockets\n"
        "from multiprocessing.connection import Listener\n"
        "shorten_sockets()\n"
        "with Listener(family='AF_UNIX') as made: print(made.address)"
    )
    found = run(program, env={"TMPDIR": str(long)})
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("/tmp/pymp-")
    assert not Path(found.stdout.strip()).parent.exists()


def test_no_folder_for_temporary_files_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    with pytest.raises(SettingError, match="set TMPDIR"):
        socket_folder(30)


def test_the_limit_is_that_of_the_kernel(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * (LONGEST - 3 - len(str(tmp_path))))
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{folder}/s")
    with socket.socket(socket.AF_UNIX) as made, pytest.raises(OSError, match="too long"):
        made.bind(f"{folder}/so")


# Homes.


def test_a_home_is_put_for_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert located("~/x") == "/home/me/x"
    assert located("file://~/x") == "file:///home/me/x"
    assert located("~") == "/home/me"
    for same in ("x/~", "s3://b/~/x", "~nobody-has-this/x", "", "/x", "sdxl"):
        assert located(same) == same


def test_who_has_no_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(SettingError, match=r"~/x: uid 54321 has no home folder"):
        located("~/x")


def test_every_path_setting_of_a_source_knows_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert Folder(folder="~/x").folder == "/home/me/x"
    assert HubDataset(repo="~/x").repo == "/home/me/x"
    assert SA1B(archives="~/x").archives == "/home/me/x"
    assert SA1B(links="~/x").links == "/home/me/x"
    assert Urls(url_list="~/x").url_list == "/home/me/x"
    config = load_config("openmoji", None, {"encode.vae": "~/vae", "caption.captioner": "~/vlm"})
    assert (config.encode.vae, config.caption.captioner) == ("/home/me/vae", "/home/me/vlm")


# Settings files.


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_yaml_in_any_encoding_of_the_standard(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: für mich\n", encoding=encoding)
    assert read_yaml_text(path) == "name: für mich\n"


@pytest.mark.parametrize(
    ("data", "line", "byte"),
    [
        (b"a: 1\nname: f\xfcr mich\n", 2, "UTF-8 (byte 0xfc)"),
        (codecs.BOM_UTF16_LE + b"a\0\0\xd8b\0", 1, "UTF-16-LE (byte 0x00)"),
    ],
)
def test_yaml_in_another_encoding_is_one_line(
    tmp_path: Path, data: bytes, line: int, byte: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(data)
    with pytest.raises(SettingError) as error:
        load_config("openmoji", path, {})
    assert f"line {line} is not {byte}" in str(error.value)


# Disks.


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_syncs_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    disk._say_once.cache_clear()
    store = Store(tmp_path)
    for name in ("a", "b"):
        store.write(f"x/{name}", b"whole")
    assert store.read("x/a") == b"whole"
    assert capsys.readouterr().err.count("cannot sync folders") == 1


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_second_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    def link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    disk._say_once.cache_clear()
    (tmp_path / "a").write_bytes(b"weights")
    disk.second_name(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"
    assert "so there are copies" in capsys.readouterr().err


def test_a_disk_that_fails_is_still_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", failing)
    with pytest.raises(OSError, match="Input/output"):
        disk.second_name(tmp_path, tmp_path / "b")


def test_what_a_terminal_cannot_show_is_no_error() -> None:
    program = (
        "from pipeline.core.streams import survive_readers; survive_readers(); "
        "print('3 · \\udcfc.jpg')"
    )
    found = run(program, env={"PYTHONIOENCODING": "ascii"})
    assert (found.returncode, found.stdout) == (0, "3 \\xb7 \\udcfc.jpg\n")


def test_a_user_whom_the_system_does_not_know_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USER", "")
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    name_user()
    assert getpass.getuser() == "uid54321"

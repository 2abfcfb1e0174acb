"""Large files over real HTTP: cut, changed, refused, killed; never half-used."""

from __future__ import annotations

import base64
import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.core.errors import SettingError, StorageError
from pipeline.core.links import harmless
from pipeline.core.staged_file import SCRATCH_VARIABLE
from pipeline.sources.files import hub, resumable, scratch_files, transfer, transfer_http
from pipeline.sources.files.resumable import TransferError
from pipeline.sources.files.transfer import local
from tests.pipeline.helpers import web
from tests.pipeline.helpers.hub_server import COMMIT, SIGNATURE, Fault, HubServer

DATA = random.Random(7).randbytes(300_000)
OTHER = random.Random(8).randbytes(280_000)


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[HubServer]:
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path / "scratch"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(resumable, "BACKOFF_S", 0.01)
    resumable.take_counters()
    with HubServer() as server:
        server.files["big.tar"] = DATA
        server.repos["owner/set"] = {"data/0001.tar": DATA, "README.md": b"small"}
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def read(url: str, **options) -> bytes:
    with local(url, **options) as path:
        return path.read_bytes()


def left() -> list[str]:
    return sorted(p.name for p in transfer.scratch().iterdir())


def test_a_file_is_whole_while_the_block_runs_and_gone_after_it(server):
    with local(f"{server.url}/big.tar") as path:
        assert path.parent == transfer.scratch()
        assert path.name.endswith("-big.tar")
        assert path.read_bytes() == DATA
    assert left() == []
    counted = resumable.take_counters()
    assert counted == {"bytes transferred": len(DATA), "files transferred": 1}


def test_a_redirect_to_bytes_asks_for_these_bytes(server):
    with web.serving() as site:
        site.route("/old.tar", web.redirect("/caf\xe9.tar?q=\xc3\xa9"))  # Latin-1, UTF-8
        site.route("/caf%E9.tar", web.data(DATA))
        assert read(f"{site.url}/old.tar") == DATA
        assert site.hits[-1].path == "/caf%E9.tar?q=%C3%A9"


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_local_files_are_read_where_they_lie(tmp_path, prefix):
    path = tmp_path / "here.tar"
    path.write_bytes(DATA)
    with local(f"{prefix}{path}") as found:
        assert found == path
    assert path.exists()
    with pytest.raises(TransferError, match="no such file"), local(f"{prefix}{path}x"):
        pass


@pytest.mark.parametrize("validators", [True, False])
def test_a_cut_connection_goes_on_where_it_broke(server, validators):
    server.validators = validators
    server.fault(cut=100_000)
    server.fault(cut=50_000)
    assert read(f"{server.url}/big.tar") == DATA
    ranges = [r.headers.get("range") for r in server.requests("big.tar")]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert resumable.take_counters()["bytes transferred"] == len(DATA)


def test_each_cut_that_brought_something_is_no_failure(server):
    server.fault(cut=20_000, times=12)
    assert read(f"{server.url}/big.tar") == DATA


def test_a_file_that_changed_meanwhile_is_fetched_anew(server):
    fault = server.fault(cut=100_000)
    url = f"{server.url}/big.tar"
    with local(url, keep=True):
        pass
    server.files["big.tar"] = OTHER  # after it was kept, and again after a cut
    server.fault(cut=100_000)
    assert read(url, keep=True) == OTHER
    assert fault.times == 0


def test_a_file_that_changes_between_two_parts_is_never_mixed(server, monkeypatch):
    server.fault(cut=100_000)
    monkeypatch.setattr(time, "sleep", lambda _: server.files.update({"big.tar": OTHER}))
    assert read(f"{server.url}/big.tar") == OTHER


@pytest.mark.parametrize("name", ["ETag", "Last_Modified"])
def test_parts_of_two_versions_are_never_mixed_whatever_a_server_takes(server, monkeypatch, name):
    server.validators = False
    first, second = {"ETag": ('W/"1"', 'W/"2"'), "Last_Modified": ("Mon", "Tue")}[name]
    server.fault(cut=100_000, headers={name: first})
    server.fault(headers={name: second}, times=2)
    other = OTHER + DATA[: len(DATA) - len(OTHER)]
    monkeypatch.setattr(time, "sleep", lambda _: server.files.update({"big.tar": other}))
    monkeypatch.setattr("tests.pipeline.helpers.hub_server._Cdn.first_byte", _any_version)
    assert read(f"{server.url}/big.tar") == other


def _any_version(handler, etag: str) -> int | None:
    """As servers do that know no If-Range."""
    return int(handler.headers["Range"][6:-1]) if "Range" in handler.headers else None


def test_a_packed_file_is_not_a_packed_answer(server):
    """Apache calls a .tgz that lies on its disk "in gzip", whatever was asked for."""
    server.files["big.tgz"] = DATA
    server.fault(headers={"Content_Encoding": "x-gzip"})
    assert read(f"{server.url}/big.tgz") == DATA


def test_without_ranges_it_begins_anew(server):
    server.fault(cut=100_000)
    server.fault(no_ranges=True)
    assert read(f"{server.url}/big.tar") == DATA
    assert resumable.take_counters()["transfers begun anew"] == 1


def test_a_server_without_ranges_that_never_gives_all_is_given_up(server):
    for cut in (200_000, 100_000) * 10:
        server.fault(cut=cut, no_ranges=True)
    with pytest.raises(TransferError, match="given up after 9 attempts"):
        read(f"{server.url}/big.tar")


@pytest.mark.parametrize("length", [100, 299_999])
def test_a_body_that_ends_early_is_not_taken_for_whole(server, length):
    server.fault(headers={"Content_Length": str(len(DATA))}, end=length)
    assert read(f"{server.url}/big.tar") == DATA


def test_a_kept_file_is_fetched_once_and_asked_about(server):
    url = f"{server.url}/big.tar"
    for _ in range(3):
        assert read(url, keep=True) == DATA
    assert resumable.take_counters()["bytes transferred"] == len(DATA)
    assert [r.headers.get("range") for r in server.requests("big")][1:] == ["bytes=300000-"] * 2


def test_errors_that_pass_are_waited_out(server, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.fault(status=503)
    server.fault(status=429, headers={"Retry_After": "7"})
    server.fault(status=500)
    assert read(f"{server.url}/big.tar") == DATA
    assert waits[1] == 7.0
    assert max(waits[0], waits[2]) < 1


def test_an_outage_ends_with_one_line_and_what_came_stays(server):
    server.fault(cut=123_456)
    server.fault(status=503, times=99)
    with pytest.raises(TransferError, match=r"big.tar: HTTP 503; .* with 123.5 KB here") as error:
        read(f"{server.url}/big.tar?token=s3cr3t")
    assert "s3cr3t" not in str(error.value)
    assert error.value.__cause__ is None
    server.faults.clear()
    assert read(f"{server.url}/big.tar?token=s3cr3t") == DATA
    assert server.seen[-1].headers["range"] == "bytes=123456-"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 404}, r"big.tar: not there \(HTTP 404\)"),
        ({"status": 403}, "refused with HTTP 403; if it is a signed link, it has expired"),
        ({"status": 418}, "HTTP 418"),
        ({"html": True}, "sent a web page, not the file"),
        ({"status": 302, "headers": {"Location": "file:///etc/passwd"}}, "No connection adapters"),
        ({"headers": {"Content_Encoding": "gzip"}}, "sent in gzip"),
    ],
)
def test_what_will_never_come_is_said_at_once(server, fault, message):
    server.faults.append(Fault(**fault))
    with pytest.raises(TransferError, match=message) as error:
        read(f"{server.url}/big.tar?Signature=s3cr3t")
    assert "s3cr3t" not in str(error.value)
    assert len(server.seen) == 1


def test_a_server_that_is_not_there(server, monkeypatch):
    monkeypatch.setattr(resumable, "ATTEMPTS", 2)
    with pytest.raises(TransferError, match="given up after 3 attempts") as error:
        read("http://127.0.0.1:1/big.tar?Signature=s3cr3t")
    assert "s3cr3t" not in str(error.value)


def test_a_drip_and_a_silence_are_given_up_for_a_new_connection(server, monkeypatch):
    monkeypatch.setattr(transfer_http, "WINDOW_S", 0.3)
    monkeypatch.setattr(transfer_http, "SILENCE_S", 0.3)
    server.fault(drip=0.01)
    server.fault(hold=1000)
    assert read(f"{server.url}/big.tar") == DATA
    assert resumable.take_counters()["transfers interrupted"] == 2


CHECKSUMS = {
    "Content_MD5": base64.b64encode(hashlib.md5(DATA).digest()).decode(),
    "Digest": "SHA-256=" + base64.b64encode(hashlib.sha256(DATA).digest()).decode(),
    "Repr_Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(DATA).digest()).decode()}:",
    "x_goog_hash": "md5=" + base64.b64encode(hashlib.md5(DATA).digest()).decode(),
}


@pytest.mark.parametrize("name", CHECKSUMS)
def test_the_checksum_that_a_server_gives_is_checked(server, name):
    headers = {name: CHECKSUMS[name]}
    server.fault(headers=headers)
    assert read(f"{server.url}/big.tar") == DATA
    server.files["big.tar"] = DATA[:-1] + b"?"
    server.fault(headers=headers, times=99)
    with pytest.raises(TransferError, match=r"(md5|sha256) is .*, upstream says .*, three times"):
        read(f"{server.url}/big.tar")


def test_the_callers_checksum_is_checked(server):
    good = "sha256:" + hashlib.sha256(DATA).hexdigest()
    assert read(f"{server.url}/big.tar", checksum=good) == DATA
    with pytest.raises(TransferError, match="upstream says 00"):
        read(f"{server.url}/big.tar", checksum="sha256:" + "00" * 32)


def test_links_signed_anew_continue_the_same_file(server):
    server.fault(cut=100_000)
    server.fault(status=403)
    with pytest.raises(TransferError, match="expired"):
        read(f"{server.url}/big.tar?Signature=old", identity="sa_000020.tar")
    assert read(f"{server.url}/big.tar?Signature=new", identity="sa_000020.tar") == DATA
    assert server.seen[-1].headers["range"] == "bytes=100000-"
    assert resumable.take_counters()["bytes transferred"] == len(DATA)


def test_names_in_the_scratch_folder_hold_no_secret(server):
    server.fault(cut=1000)
    server.fault(status=404)
    with pytest.raises(TransferError):
        read(f"{server.url}/big.tar?Signature=s3cr3t")
    assert left()
    assert "s3cr3t" not in "".join(left() + [p.read_text("latin-1") for p in _scratch_files()])


def _scratch_files() -> list[Path]:
    return [p for p in transfer.scratch().iterdir() if p.is_file()]


@pytest.mark.parametrize("before", [0, 280, 285, 290, 295])
def test_a_message_that_is_cut_shows_no_half_of_a_password(before):
    line = harmless("x" * before + " https://me:s3cr3t@host/a?sig=s3cr3t failed")
    assert "s3" not in line
    assert len(line) <= 300


def test_a_full_disk_is_found_before_the_first_byte(server, monkeypatch):
    usage = shutil.disk_usage(transfer.scratch())
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=scratch_files.RESERVE + 9)
    )
    with pytest.raises(
        StorageError, match=r"300.0 KB needed for big.tar, 268.4 MB free; .*SCRATCH"
    ):
        read(f"{server.url}/big.tar")


def test_a_full_disk_on_the_way(server, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transfer_http, "_read", full)
    with pytest.raises(StorageError, match="No space left on device; mend it, or set MICRODIT_"):
        read(f"{server.url}/big.tar")


def test_what_killed_runs_left_goes_where_space_is_short(server, monkeypatch):
    server.fault(cut=1000)
    server.fault(status=404)
    with pytest.raises(TransferError):
        read(f"{server.url}/big.tar?old")
    for path in transfer.scratch().iterdir():
        os.utime(path, (1, 1))
    before = left()
    usage = shutil.disk_usage(transfer.scratch())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(StorageError):
        read(f"{server.url}/big.tar?new")
    assert not set(before) & set(left())


def test_a_scratch_folder_of_somebody_else_is_not_trusted(monkeypatch, tmp_path):
    monkeypatch.delenv(SCRATCH_VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert transfer.scratch().stat().st_mode & 0o777 == 0o700
    os.chown(transfer.scratch(), 12345, -1) if os.getuid() == 0 else pytest.skip("needs root")
    with pytest.raises(StorageError, match="is another user's"):
        transfer.scratch()


class Order(NamedTuple):
    url: str
    environment: dict[str, str]


def _fetch(order: Order) -> bytes:
    os.environ.update(order.environment)
    return read(order.url, keep=True)


def test_many_processes_fetch_one_file_once(server):
    environment = {SCRATCH_VARIABLE: os.environ[SCRATCH_VARIABLE]}
    order = Order(f"{server.url}/big.tar", environment)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_fetch, [order] * 6) == [DATA] * 6
    whole = [r for r in server.requests("big.tar") if "range" not in r.headers]
    assert len(whole) == 1


def test_a_killed_process_leaves_what_the_next_goes_on_from(server):
    fault = server.fault(hold=150_000)
    url = f"{server.url}/big.tar"
    code = f"from pipeline.sources.files.transfer import local\nwith local({url!r}): pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    assert fault.begun.wait(30)
    part = _wait_for_part(150_000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists()
    assert read(f"{server.url}/big.tar") == DATA
    assert server.seen[-1].headers["range"] == f"bytes={150_000}-"
    assert left() == []


def _wait_for_part(size: int) -> Path:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for path in transfer.scratch().glob("*.part"):
            if path.stat().st_size == size:
                return path
        time.sleep(0.02)
    raise AssertionError(f"no part of {size} bytes in {left()}")


def test_a_hub_file_comes_from_the_cdn_with_its_sha256_checked(server):
    url = hub.address("owner/set", COMMIT, "data/0001.tar")
    server.fault(cut=100_000)
    assert read(url) == DATA
    assert [r.headers.get("range") for r in server.requests("/repos/")] == [None, "bytes=100000-"]
    assert read("hf://datasets/owner/set/README.md") == b"small"


def test_a_hub_file_that_differs_from_its_sha256(server, monkeypatch):
    real = server.repos["owner/set"]["data/0001.tar"]
    digest = hashlib.sha256(real).hexdigest()
    broken = bytes([real[0] ^ 1]) + real[1:]
    server.files["broken"] = broken
    link = hub.link

    def to_broken(url: str) -> hub.Link:
        found = link(url)
        assert found.facts.checksum == f"sha256:{digest}"
        return found._replace(url=f"{server.url}/broken")

    monkeypatch.setattr(hub, "link", to_broken)
    with pytest.raises(TransferError, match=r"sha256 is .*three times"):
        read("hf://datasets/owner/set/data/0001.tar")


def test_a_gated_dataset_says_how_to_get_in(server, monkeypatch):
    server.gated.add("owner/set")
    page = f"{server.endpoint}/datasets/owner/set"
    for token in ("", "hf_wrong_token"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(SettingError, match=f"owner/set is gated: .* on {page}, then") as error:
            read("hf://datasets/owner/set/data/0001.tar")
        assert "\n" not in str(error.value)
        assert token not in str(error.value) or not token
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert read("hf://datasets/owner/set/data/0001.tar") == DATA
    assert all(server.token not in r.headers.get("authorization", "") for r in _of_cdn(server))


def _of_cdn(server: HubServer):
    return server.requests("/repos/") + server.requests("/repos/", "HEAD")


def test_a_branch_becomes_a_commit_and_a_commit_asks_nobody(server):
    assert hub.commit("owner/set") == COMMIT
    asked = len(server.seen)
    assert hub.commit("owner/set", "a" * 40) == "a" * 40
    assert len(server.seen) == asked
    assert hub.files("owner/set", COMMIT) == ["README.md", "data/0001.tar"]
    assert hub.files("owner/set", COMMIT, "data") == ["data/0001.tar"]


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("hf://datasets/owner/none/a.tar", SettingError, "owner/none: there is no such dataset"),
        ("hf://datasets/owner/set@v9/a.tar", SettingError, "no revision v9"),
        ("hf://datasets/owner/set/a.tar", TransferError, "owner/set@main: no file a.tar"),
        ("hf://owner/set/a.tar", SettingError, "write hf://datasets/OWNER/NAME/PATH"),
        ("nothing://x/a.tar", SettingError, "nothing://x/a.tar: Protocol not known"),
    ],
)
def test_addresses_that_lead_nowhere(server, url, error, message):
    with pytest.raises(error, match=message) as found:
        read(url)
    assert "\n" not in str(found.value)
    assert SIGNATURE not in str(found.value)


def test_any_file_system_of_fsspec(server):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/big.tar", DATA)
    try:
        assert read("memory://bucket/big.tar") == DATA
        with pytest.raises(TransferError, match="there is no such file"):
            read("memory://bucket/none.tar")
    finally:
        memory.rm("/bucket", recursive=True)

"""A real S3 server for tests: SeaweedFS, on this machine only, with credentials that it checks."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEY, SECRET = "tester", "tester-secret-f00d"
BUCKET = "microdit"
START_S = 60.0  # on a busy machine; 4 to 10 s otherwise

#: What the pipeline (s3fs) and the trainer (boto3, through streaming) both go by: all they need.
VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")


class S3Server:
    """One process that is master, volume server, filer and S3 gateway; `with` starts and ends it.

    Args:
        folder: where its data and log lie, best on a disk that is left when the test ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, endpoint: str | None = None, **changes: str) -> dict[str, str]:
        """Variables for a process that is to use this server, or a proxy before it."""
        return {**dict(zip(VARIABLES, (KEY, SECRET, endpoint or self.url), strict=True)), **changes}

    def __enter__(self) -> S3Server:
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = {
            "name": KEY,
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = self.folder / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        self.port, *ports = _free_ports(4)
        flags = {
            "dir": self.folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 100,  # a bucket takes seven to begin with, of 64 MB, not preallocated
            "volume.preStopSeconds": 0,
            "s3": "true",
            "s3.config": config,
            "s3.autoCreateBucket": "false",
            "s3.iam": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": self.folder / "s3.sock",
            "filer.localSocket": self.folder / "filer.sock",
        }
        for name, port in zip(
            ("s3", "master", "volume", "filer"), (self.port, *ports), strict=True
        ):
            flags |= {f"{name}.port": port, f"{name}.port.grpc": port + 10_000}
        (self.folder / "data").mkdir(exist_ok=True)
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [Path(sys.executable).with_name("weed"), "server"]
                + [f"-{name}={value}" for name, value in flags.items()],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                preexec_fn=_die_with_parent,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # asked to end, it takes 15 s; nobody will read its data again
            self._process.wait()
            self._process = None

    def client(self) -> Any:
        """A boto3 client with the right credentials: another implementation than the Store's."""
        return _client(self.url)

    def _wait(self) -> None:
        """Until a bucket can be made, and an object be written to it."""
        assert self._process is not None
        deadline = time.monotonic() + START_S
        while True:
            try:
                with contextlib.suppress(self.client().exceptions.BucketAlreadyExists):
                    self.client().create_bucket(Bucket=BUCKET)
                self.client().put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
                self.client().delete_object(Bucket=BUCKET, Key="ready")
                return
            except Exception as error:  # whatever a half-started server answers
                gone = self._process.poll() is not None
                if gone or time.monotonic() > deadline:
                    log = (self.folder / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"SeaweedFS did not start: {error}\n{log}") from error
                time.sleep(0.2)


@contextlib.contextmanager
def variables(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables of this process while the block runs, and no client kept from before.

    fsspec keeps one client for each set of arguments, and credentials are not among them.
    """
    import fsspec

    before = dict(os.environ)
    _forget(fsspec)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        _forget(fsspec)


def _forget(fsspec: Any) -> None:
    with contextlib.suppress(ImportError):
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@functools.cache
def _client(url: str) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30),
    )


def _free_ports(count: int) -> list[int]:
    """Ports that are free on loopback, as is the one 10,000 above each, where gRPC is to listen."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(12_000, 22_000)
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _die_with_parent() -> None:
    """So that a killed test run leaves no server behind (Linux only, where the tests run)."""
    import ctypes

    parent_death_signal = 1  # PR_SET_PDEATHSIG
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)

"""What a Store needs to know of object stores beyond fsspec's common ground."""

from __future__ import annotations

import socket
from typing import Any, cast

from pipeline.core.errors import SettingError

CONNECTIONS = 64  # at once; botocore's 10 are few where each answer takes 30 ms
SILENCE_S = 30  # of the server, before a connection is given up
_S3 = ("s3", "s3a")


def connect(root: str, protocol: str) -> Any:
    """The fsspec file system of a URL; no request is made yet.

    Raises:
        SettingError: no such protocol, or its client is not installed.
    """
    import fsspec

    try:
        # Listings are asked for to see what others wrote a moment ago: never from a cache.
        found = fsspec.filesystem(protocol, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        extra = {"s3": "s3", "gs": "gs", "gcs": "gs"}.get(protocol)
        remedy = f"; install the extra: pip install microdit[{extra}]" if extra else ""
        first = str(error).strip().splitlines()[0]
        raise SettingError(f"--root {root}: {first}{remedy}") from error
    if protocol in _S3:
        _patient(found)
    return found


def reading(protocol: str) -> dict[str, Any]:
    """Options of cat_file: one request a file.

    s3fs would ask for the size first, to read a large file in parts, of which it begins none again
    that was cut off.
    """
    return {"max_concurrency": 1} if protocol in _S3 else {}


def listing(fs: Any, url: str) -> list[dict[str, Any]]:
    """What lies in a folder; empty, or a FileNotFoundError, where there is none."""
    if not hasattr(fs, "_lsdir"):
        return fs.ls(url, detail=True)
    # s3fs looks for a folder that is not there in its parent, and lists all of that: of a group,
    # every data file, to learn that no shard of it has failed.
    from fsspec.asyn import sync

    return cast(list[dict[str, Any]], sync(fs.loop, fs._lsdir, fs._strip_protocol(url)))


def is_file(row: dict[str, Any]) -> bool:
    """Not a folder: some stores, and consoles, keep an empty object "folder/" for one."""
    return row["type"] == "file" and not row["name"].endswith("/")


def is_missing_bucket(error: BaseException) -> bool:
    """Whether it is not the file that is missing: botocore's error behind s3fs's tells."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code") == "NoSuchBucket"


def _patient(s3: Any) -> None:
    """How long to try, before the first request; FSSPEC_S3 and AWS_MAX_ATTEMPTS still decide.

    Botocore tries five times and waits between; s3fs does all that five times, for what it thinks
    worth it, among it a server that says nothing: 25 times 15 s. It is also the only one to begin
    a download again that was cut off, hence twice. And 15 s is too short for an upload over a slow
    line, where a few megabytes still lie in the kernel's buffer when the waiting begins.
    """
    if s3.session is not None:  # fsspec gives every Store the same
        return
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header

    s3.retries = 2
    s3.config_kwargs.setdefault("read_timeout", SILENCE_S)
    s3.config_kwargs.setdefault("max_pool_connections", CONNECTIONS)
    # Nothing limits the time an upload waits, for leave to begin or for the server to take more of
    # it: ask for no leave, and let the kernel end a connection that takes nothing.
    s3.session = AioSession(**s3.kwargs)
    s3.session.unregister("before-call.s3", add_expect_header)
    s3.config_kwargs.setdefault("connector_args", {"socket_factory": _impatient})


def _impatient(address: tuple) -> socket.socket:
    """A socket whose connection ends when what was sent is not taken for SILENCE_S."""
    made = socket.socket(*address[:3])
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)
    return made

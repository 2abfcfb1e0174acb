"""One attempt to fetch, or go on fetching, a large file over HTTP."""

from __future__ import annotations

import base64
import binascii
import functools
import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.core.links import harmless, public
from pipeline.sources.files.resumable import (
    COUNTERS,
    Changed,
    Facts,
    Interrupted,
    Transfer,
    TransferError,
)

if TYPE_CHECKING:
    import requests

CONNECT_S = 15.0
SILENCE_S = 60.0  # without a byte
WINDOW_S = 60.0  # a connection that brings less than SLOWEST in it is given up for a new one
SLOWEST = 1024.0  # bytes a second
BLOCK = 1 << 20

_RETRIED = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524)


def fetch(job: Transfer, url: str, headers: Mapping[str, str], known: Facts) -> None:
    """Appends to the job's file what is missing of it.

    Args:
        headers: of the request, e.g. Authorization; never sent on to another host.
        known: what is known of the file before it is asked for.

    Raises:
        Interrupted, Changed, TransferError.
    """
    import requests
    from requests import exceptions
    from urllib3.exceptions import HTTPError

    have, facts = job.resumable()
    asked = {**headers, "Accept-Encoding": "identity"}
    if have:
        if known.version and known.version != facts.version:
            raise Changed("upstream has another version now")
        asked["Range"] = f"bytes={have}-"
        # A weak ETag is no promise that the bytes are the same, so no server takes it here. A hub's
        # own version names the content, but the CDN that we are sent to does not know it.
        if facts.version and not known.version and not facts.version.startswith("W/"):
            asked["If-Range"] = facts.version
    try:
        with _session().get(
            url, headers=asked, stream=True, timeout=(CONNECT_S, SILENCE_S)
        ) as response:
            _judge(response, url)
            offset = _offset(response, have, facts)
            if offset is None:
                return  # all is there
            if offset and not known.version and _version(response) not in ("", facts.version):
                raise Changed("upstream has another version now")  # and it knows no If-Range
            if offset == 0:
                facts = _facts(response, known)
            with job.begin(facts, offset) as file:
                _read(response, file)
    except (exceptions.InvalidURL, exceptions.InvalidSchema, exceptions.TooManyRedirects) as error:
        raise TransferError(f"{public(url)}: {harmless(str(error))}") from None
    except (requests.RequestException, HTTPError, ConnectionError, TimeoutError) as error:
        text = harmless(str(error))
        if "CERTIFICATE_VERIFY_FAILED" in text:
            raise TransferError(f"{public(url)}: {text}") from None
        raise Interrupted(f"{type(error).__name__}: {text}") from None


@functools.cache
def _process_session(pid: int) -> requests.Session:
    import requests

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> str | None:
            """As requests has it, but for bytes that are no UTF-8, at which it breaks off."""
            location = resp.headers.get("location", "")
            if resp.is_redirect and not location.isascii():
                data = location.encode("latin-1", "replace")
                return "".join(chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in data)
            return super().get_redirect_target(resp)

    return Session()


def _session() -> requests.Session:
    """One for each process: connections are used again, and none is shared after a fork."""
    return _process_session(os.getpid())


def _judge(response: requests.Response, url: str) -> None:
    """Whether the answer is what was asked for."""
    status = response.status_code
    if status in _RETRIED:
        raise Interrupted(f"HTTP {status}", retry_after(response.headers))
    if status in (401, 403):
        raise TransferError(
            f"{public(url)}: refused with HTTP {status}; if it is a signed link, it has expired: "
            "get a new one"
        )
    if status in (404, 410):
        raise TransferError(f"{public(url)}: not there (HTTP {status})")
    if status not in (200, 206, 416):
        raise TransferError(f"{public(url)}: HTTP {status}")
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind == "text/html" and not url.partition("?")[0].endswith((".html", ".htm")):
        raise TransferError(
            f"{public(url)}: the server sent a web page, not the file; the link may have expired, "
            "or needs a login"
        )
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    packed = urlsplit(url).path.endswith((".gz", ".tgz")) and coding in ("gzip", "x-gzip")
    if coding not in ("", "identity") and not packed:  # Apache says it of files that are so
        raise TransferError(f"{public(url)}: sent in {coding} though identity was asked for")


def _offset(response: requests.Response, have: int, facts: Facts) -> int | None:
    """Where the answer's first byte belongs; None: there is nothing to add."""
    status = response.status_code
    if status == 200:
        if have:
            COUNTERS["transfers begun anew"] += 1  # no ranges here, or upstream has changed
        return 0
    stated = response.headers.get("Content-Range", "")
    if status == 416:
        total = re.fullmatch(r"bytes \*/(\d+)", stated.strip())
        if have and have == facts.size and (total is None or int(total[1]) == have):
            return None
        raise Changed("upstream has no such range")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", stated.strip())
    if found is None or int(found[1]) != have or found[3] not in ("*", str(facts.size)):
        raise Changed(f"upstream answered with the range {stated!r}")
    return have


def _facts(response: requests.Response, known: Facts) -> Facts:
    """What is known of a file from the head of an answer that holds all of it."""
    headers = response.headers
    length = headers.get("Content-Length", "")
    size = int(length) if length.isdigit() else None
    if known.size is not None and size is not None and size != known.size:
        raise Changed(f"{size} bytes are sent, {known.size} were announced")
    version = known.version or _version(response)
    checksum = known.checksum or _checksum(headers)
    return replace(known, size=known.size or size, version=version, checksum=checksum)


def _version(response: requests.Response) -> str:
    return response.headers.get("ETag", "") or response.headers.get("Last-Modified", "")


def _checksum(headers: Mapping[str, str]) -> str:
    """ "sha256:…" or "md5:…" of the whole file, where the server gives one; else ""."""
    digests = f"{headers.get('Repr-Digest', '')},{headers.get('Digest', '')}"
    stated = [
        ("sha256", re.search(r"(?i)\bsha-256=:?([A-Za-z0-9+/]{43}=):?", digests)),
        ("md5", re.search(r"\bmd5=([A-Za-z0-9+/]{22}==)", headers.get("x-goog-hash", ""))),
        ("md5", re.fullmatch(r"([A-Za-z0-9+/]{22}==)", headers.get("Content-MD5", "").strip())),
    ]
    for algorithm, found in stated:
        if found is not None:
            try:
                return f"{algorithm}:{base64.b64decode(found[1], validate=True).hex()}"
            except binascii.Error:
                continue
    return ""


def _read(response: requests.Response, file: Any) -> None:
    """The answer's body to the file, as it comes."""
    began, received = time.monotonic(), 0
    while True:
        block = response.raw.read1(BLOCK)
        if not block:
            return
        file.write(block)
        COUNTERS["bytes transferred"] += len(block)
        received += len(block)
        elapsed = time.monotonic() - began
        if elapsed > WINDOW_S:
            if received < SLOWEST * elapsed:
                raise Interrupted(f"only {received} bytes came in {elapsed:.0f} s")
            began, received = time.monotonic(), 0


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait; 0 where it does not."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0

"""What one answer is worth: a picture's bytes, another try, or the reason why there is none."""

from __future__ import annotations

import email.utils
import errno
import socket
import ssl
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp
from yarl import URL

from pipeline.sources.web.settings import FetchError

AGAIN = (408, 425, 429, 500, 502, 503, 504)
REDIRECTS = (301, 302, 303, 307, 308)
GIVEN = (200, 203)
_SHORT = 2**16  # bytes of a body of no interest that are read, to use its connection again


class Transient(Exception):
    """What may go better another time.

    Args:
        wait_s: how long the server asks to wait.
    """

    def __init__(self, detail: str, wait_s: float | None = None) -> None:
        super().__init__(detail)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes = b""


@contextmanager
def explained(url: URL, silence_s: float) -> Iterator[None]:
    """Turns the client's errors into ours. Messages name the host, never the link.

    Raises:
        Transient: timeouts, resets, a name server that does not answer now.
        FetchError: no such host, a certificate that is not good, what is no HTTP.
    """
    try:
        yield
    except aiohttp.ClientConnectorDNSError as error:
        text = f"{url.host}: {error.os_error.strerror or error.os_error}"
        if error.os_error.errno == socket.EAI_AGAIN:
            raise Transient(text) from error
        raise FetchError("failed_to_download", text) from error
    except (aiohttp.ClientSSLError, ssl.SSLError) as error:
        raise FetchError("failed_to_download", f"TLS: {_tls_text(error)}") from error
    except TimeoutError as error:  # aiohttp's are such, too
        raise Transient(f"{url.host}: nothing came for {silence_s:g} s") from error
    except aiohttp.ServerDisconnectedError as error:
        raise Transient(f"{url.host} closed the connection without an answer") from error
    except OSError as error:  # aiohttp.ClientOSError is one
        name = errno.errorcode.get(error.errno or 0, type(error).__name__)
        raise Transient(f"{url.host}: connection failed: {name}") from error
    except (aiohttp.ClientError, ValueError) as error:  # a header too long, a name that is none
        raise FetchError("failed_to_download", f"no HTTP: {type(error).__name__}") from error


async def drain(response: aiohttp.ClientResponse) -> None:
    """Reads a short body of no interest; a connection with a longer one is closed."""
    if response.content_length is not None and response.content_length <= _SHORT:
        await response.read()


async def read_start(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The first bytes of a body, at most `limit`."""
    found = b""
    while len(found) < limit and (part := await response.content.readany()):
        found += part
    return found[:limit]


async def read_picture(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """A body that is whole and may be a picture.

    Raises:
        FetchError: "too-large", "undecodable", or nothing came.
        Transient: the connection ended before the length that was announced.
    """
    parts, got = [], 0
    try:
        while part := await response.content.readany():
            got += len(part)
            if got > limit:
                raise FetchError("too-large", f"over {limit:,} bytes")
            parts.append(part)
    except aiohttp.ClientPayloadError as error:
        length = response.content_length
        expected = "" if length is None else f" of {length:,}"
        raise Transient(f"the connection ended after {got:,}{expected} bytes") from error
    body = _decoded(b"".join(parts), response.headers, limit)
    if not body:
        raise FetchError("failed_to_download", "an empty answer with status 200")
    # By its bytes, as many a server says text/html of a JPEG: what dead links lead to.
    if body[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        kind = response.headers.get("Content-Type", "no type").partition(";")[0][:40]
        raise FetchError("undecodable", f"a page and no picture ({kind}, {len(body):,} bytes)")
    return body


def retry_after(value: str | None) -> float | None:
    """Seconds to wait, from seconds or a date; None for neither."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _decoded(data: bytes, headers: Mapping[str, str], limit: int) -> bytes:
    """A body without its content coding, which some servers apply without being asked."""
    coding = headers.get("Content-Encoding", "identity").strip().lower()
    if coding in ("", "identity"):
        return data
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("undecodable", f"content coding {coding[:20]}, which nobody asked for")
    stream = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        found = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise FetchError("undecodable", f"content coding {coding}: {error}") from error
    if len(found) > limit:
        raise FetchError("too-large", f"over {limit:,} bytes once uncompressed")
    return found


def _tls_text(error: BaseException) -> str:
    inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    return getattr(inner, "verify_message", "") or getattr(inner, "reason", "") or str(inner)

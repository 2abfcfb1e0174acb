"""An HTTP proxy on loopback that fails on purpose: in front of an S3 server, between it and us.

It forwards a request's head unchanged but for Connection, so signatures stay valid, and takes one
request a connection, so that what is cut is one request.
"""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

CHUNK = 1 << 16
ALWAYS = 1 << 30

_ERRORS = {
    500: ("Internal Server Error", "InternalError", "We encountered an internal error."),
    503: ("Slow Down", "SlowDown", "Please reduce your request rate."),
    403: ("Forbidden", "AccessDenied", "Access Denied"),
}


class Request(NamedTuple):
    method: str
    path: str  # with the query


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match."""

    method: str = ""  # a regular expression, as is path; "" matches all
    path: str = ""
    times: int = ALWAYS
    status: int = 0  # answer this and ask nobody: 500, 503 (SlowDown) or 403
    delay_s: float = 0.0  # before anything else happens
    cut_upload: int | None = None  # bytes of the request's body, then both connections are reset
    hold_upload: int | None = None  # bytes of the body; the rest never arrives, nor any answer
    cut_download: int | None = None  # bytes of the answer's body, then the same
    upload_rate: float | None = None  # bytes a second
    #: Is set once a request was hit: for an upload, once its first bytes have gone through.
    begun: threading.Event = field(default_factory=threading.Event)
    hits: int = 0

    def matches(self, request: Request) -> bool:
        return (
            self.hits < self.times
            and re.fullmatch(self.method or ".*", request.method) is not None
            and re.search(self.path, request.path) is not None
        )


class FaultyProxy:
    """Listens on a port of its own and forwards to `port`; `with` starts and ends it.

    Attributes:
        seen: every request so far, in order of arrival.
    """

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.seen: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Connection)
        self._server.proxy = self
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """No fault from now on, and no request on record."""
        with self._lock:
            self._faults.clear()
            self.seen.clear()

    def count(self, method: str, path: str = "") -> int:
        """How many requests matched since the last heal()."""
        with self._lock:
            seen = list(self.seen)
        return sum(r.method == method and re.search(path, r.path) is not None for r in seen)

    def _arrived(self, request: Request) -> Fault | None:
        with self._lock:
            self.seen.append(request)
            for fault in self._faults:
                if fault.matches(request):
                    fault.hits += 1
                    return fault
        return None


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultyProxy


class _Connection(socketserver.BaseRequestHandler):
    request: socket.socket
    server: _Server

    def handle(self) -> None:
        # Either side may hang up; the other notices when its socket is closed.
        with contextlib.suppress(OSError):
            self._handle()

    def _handle(self) -> None:
        proxy = self.server.proxy
        head, body = self._read_head()
        if not head:
            return
        first, _, fields = head.partition(b"\r\n")
        method, path, _ = first.decode("latin-1").split(" ", 2)
        fault = proxy._arrived(Request(method, path)) or Fault()
        if fault.delay_s and proxy._stop.wait(fault.delay_s):
            return
        if fault.status:
            fault.begun.set()
            self._answer(fault.status, fields)
            return
        kept = [f for f in fields.split(b"\r\n") if not f.lower().startswith(b"connection:")]
        head = b"\r\n".join([first, b"Connection: close", *kept])
        with socket.create_connection(("127.0.0.1", proxy.upstream)) as upstream:
            upstream.sendall(head + b"\r\n\r\n")
            back = threading.Thread(target=self._download, args=(upstream, fault), daemon=True)
            back.start()
            self._upload(upstream, body, fault)
            back.join()

    def _read_head(self) -> tuple[bytes, bytes]:
        data = b""
        while b"\r\n\r\n" not in data:
            more = self.request.recv(CHUNK)
            if not more:
                return b"", b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        return head, body

    def _upload(self, upstream: socket.socket, data: bytes, fault: Fault) -> None:
        """Client to server, until the client has hung up or the answer was sent."""
        sent = 0
        limit = fault.cut_upload if fault.cut_upload is not None else fault.hold_upload
        try:
            while True:
                if limit is not None:
                    data = data[: max(0, limit - sent)]
                if data:
                    upstream.sendall(data)
                    sent += len(data)
                    if fault.upload_rate:
                        time.sleep(len(data) / fault.upload_rate)
                if limit is None or sent >= limit:
                    fault.begun.set()
                if fault.cut_upload is not None and sent >= fault.cut_upload:
                    _reset(self.request)
                    _reset(upstream)
                    return
                data = self.request.recv(CHUNK)
                if not data:
                    break
        except OSError:
            pass
        # Hung up in the middle, or the answer is complete and _download has shut our socket.
        _shut(upstream)

    def _download(self, upstream: socket.socket, fault: Fault) -> None:
        """Server to client, until the server has hung up."""
        left = fault.cut_download
        seen = b""
        try:
            while data := upstream.recv(CHUNK):
                if left is not None and b"\r\n\r\n" not in seen:
                    seen += data  # the head, and what came with it
                    _, gap, body = seen.partition(b"\r\n\r\n")
                    if gap:
                        self.request.sendall(seen[: len(seen) - max(0, len(body) - left)])
                        left -= len(body)
                elif left is not None:
                    self.request.sendall(data[: max(0, left)])
                    left -= len(data)
                else:
                    self.request.sendall(data)
                if left is not None and left <= 0:
                    fault.begun.set()
                    _reset(self.request)
                    break
        except OSError:
            pass
        _shut(self.request)
        _shut(upstream)

    def _answer(self, status: int, fields: bytes) -> None:
        title, code, text = _ERRORS[status]
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            f"<Error><Code>{code}</Code><Message>{text}</Message></Error>"
        ).encode()
        head = (
            f"HTTP/1.1 {status} {title}\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        ).encode()
        self.request.sendall(head + body)
        self.request.shutdown(socket.SHUT_WR)
        # A client that is still sending must not be reset: it would never read the answer.
        self.request.settimeout(10)
        while self.request.recv(CHUNK):
            pass


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _reset(connection: socket.socket) -> None:
    """Ends a connection the hard way, as a network that fails does."""
    linger_none = b"\x01\x00\x00\x00\x00\x00\x00\x00"
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_none)
    _shut(connection)  # where another thread waits for its bytes, close() alone does nothing yet
    connection.close()

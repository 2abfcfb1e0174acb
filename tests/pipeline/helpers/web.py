"""A real HTTP(S) server on loopback that behaves, and misbehaves, as servers on the web do."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Route = Callable[["Handler"], None]


@dataclass(frozen=True)
class Hit:
    path: str
    headers: dict[str, str]  # names in lower case
    at: float  # time.monotonic()


class Web:
    """What the server gives, by path; and what it was asked for."""

    def __init__(self, url: str) -> None:
        self.url = url  # without a slash at its end
        self.files: dict[str, bytes] = {}  # served with ETag, ranges and keep-alive
        self.routes: dict[str, Route] = {}  # come first
        self.headers: dict[str, dict[str, str]] = {}  # further headers of a file
        self.hits: list[Hit] = []
        self.open_now = Counter[str]()  # requests in the server's hands, by path
        self.open_most = 0
        self.connections = 0
        self.lock = threading.Lock()

    def add(self, path: str, data: bytes, **headers: str) -> str:
        """A file; returns its link."""
        self.files[path] = data
        self.headers[path] = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.url + path

    def route(self, path: str, route: Route) -> str:
        self.routes[path] = route
        return self.url + path

    def count(self, path: str) -> int:
        return sum(hit.path == path for hit in self.hits)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web
    timeout = 30
    disable_nagle_algorithm = True  # or each answer takes the 40 ms of a delayed ACK

    def setup(self) -> None:
        super().setup()
        with self.web.lock:
            self.web.connections += 1

    def do_GET(self) -> None:
        web, path = self.web, self.path
        headers = {name.lower(): value for name, value in self.headers.items()}
        with web.lock:
            web.hits.append(Hit(path, headers, time.monotonic()))
            web.open_now[path] += 1
            web.open_most = max(web.open_most, web.open_now.total())
        try:
            route = web.routes.get(path) or web.routes.get(path.partition("?")[0])
            if route is not None:
                route(self)
            else:
                self._file(path.partition("?")[0])
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            self.close_connection = True
        finally:
            with web.lock:
                web.open_now[path] -= 1

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _file(self, path: str) -> None:
        data = self.web.files.get(path)
        if data is None:
            self.answer(404, b"not here")
            return
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        more = {"ETag": tag, "Accept_Ranges": "bytes", **self.web.headers.get(path, {})}
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes=") or self.headers.get("If-Range", tag) != tag:
            self.answer(200, data, **more)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(data) - int(last)
        end = min(int(last), len(data) - 1) if first and last else len(data) - 1
        if start > end:
            self.answer(416, Content_Range=f"bytes */{len(data)}")
            return
        more["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
        self.answer(206, data[start : end + 1], **more)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> Iterator[Web]:
    """A server, until the block ends."""

    class Own(Handler):
        pass

    server = _Server((host, 0), Own)
    if tls is not None:
        server.socket = tls.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    port = server.server_address[1]
    Own.web = Web(f"{'http' if tls is None else 'https'}://{host}:{port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield Own.web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    block_on_close = False

    def handle_error(self, request, client_address) -> None:  # a client that left: expected here
        pass


# What servers do; each is a route.


def redirect(to: str, status: int = 302) -> Route:
    return lambda handler: handler.answer(status, Location=to)


def status(code: int, body: bytes = b"", **headers: str) -> Route:
    return lambda handler: handler.answer(code, body, **headers)


def page(text: str = "<!DOCTYPE html><html><body>Not found</body></html>") -> Route:
    """What dead links lead to: status 200."""
    return lambda handler: handler.answer(200, text.encode(), Content_Type="text/html")


def first(times: int, bad: Route, good: Route) -> Route:
    """One behaviour for the first requests, then another."""
    left = [times]

    def route(handler: Handler) -> None:
        with handler.web.lock:
            left[0] -= 1
            now = bad if left[0] >= 0 else good
        now(handler)

    return route


def data(body: bytes, **headers: str) -> Route:
    return lambda handler: handler.answer(200, body, **headers)


def silence(seconds: float) -> Route:
    """Nothing at all, for so long."""

    def route(handler: Handler) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return route


def drip(body: bytes, pause_s: float = 0.05) -> Route:
    """The body, a byte at a time: no pause is long, the whole takes forever."""

    def route(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        for byte in body:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(pause_s)

    return route


def short(body: bytes, missing: int = 1000) -> Route:
    """Announces more than comes, then closes."""

    def route(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body) + missing))
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True

    return route


def long(body: bytes, announced: int) -> Route:
    """More than was announced."""

    def route(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(announced))
        handler.end_headers()
        handler.wfile.write(body)

    return route


def reset(after: bytes = b"") -> Route:
    """A connection reset, before the answer or in its body."""

    def route(handler: Handler) -> None:
        if after:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(after) + 1000))
            handler.end_headers()
            handler.wfile.write(after)
            handler.wfile.flush()
            time.sleep(0.02)
        linger = struct.pack("ii", 1, 0)  # close() sends RST
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        handler.close_connection = True
        handler.rfile.close()
        handler.wfile.close()
        handler.connection.close()

    return route


def chunked(parts: Iterator[bytes] | list[bytes], **headers: str) -> Route:
    """No length is announced."""

    def route(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        for part in parts:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    return route


def certificates(folder: Path, *names: str) -> tuple[Path, ssl.SSLContext]:
    """A certificate authority of one's own, and a server's context for these names or addresses.

    Returns:
        (the authority's certificate as PEM: a client's SSL_CERT_FILE, context)
    """
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def made(subject: str, key, issuer: str, signer, more) -> x509.Certificate:
        def name(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        for extension, critical in more:
            builder = builder.add_extension(extension, critical)
        return builder.sign(signer, hashes.SHA256())

    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = made(
        "test authority",
        authority,
        "test authority",
        authority,
        [(x509.BasicConstraints(ca=True, path_length=None), True)],
    )
    alternatives = [
        x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else x509.DNSName(n)
        for n in names
    ]
    leaf = made(
        "test server",
        key,
        "test authority",
        authority,
        [(x509.SubjectAlternativeName(alternatives), False)],
    )
    pem = serialization.Encoding.PEM
    (folder / "root.pem").write_bytes(root.public_bytes(pem))
    (folder / "server.pem").write_bytes(
        leaf.public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return folder / "root.pem", context

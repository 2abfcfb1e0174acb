"""A file server and a hub on loopback, which answer as the real ones do, and fail on purpose.

Two ports: "the hub", with the API and the resolve addresses of huggingface.co, which redirects to
"the CDN" with a signed link; the CDN also serves plain files, with ranges and ETags.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

COMMIT = "c0ffee" * 6 + "beef"
SIGNATURE = "Signature=s3cr3t-of-the-cdn"
LFS_BYTES = 64  # smaller files lie in git itself, as those below 10 MB do in the real hub


class Request(NamedTuple):
    method: str
    path: str  # with the query
    headers: dict[str, str]  # names in lower case


@dataclass
class Fault:
    """What happens to the next `times` requests of the CDN whose path matches."""

    path: str = ""  # a regular expression
    times: int = 1
    method: str = "GET"
    status: int = 0  # answer this
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # bytes of the body, then a reset
    hold: int | None = None  # bytes of the body, then nothing more until the server ends
    end: int | None = None  # bytes of the body, then a proper end, with no length announced
    drip: float | None = None  # seconds between single bytes
    no_ranges: bool = False
    html: bool = False  # an error page with status 200
    begun: threading.Event = field(default_factory=threading.Event)  # its body has begun


class HubServer:
    """`with` starts and ends both servers.

    Attributes:
        files: path on the CDN -> bytes; change it and upstream has changed.
        repos: "owner/name" -> {path: bytes}.
        gated: repos that only `token` may read.
        validators: whether the CDN sends ETags.
        busy: how many more questions to the hub itself get a 503.
        seen: every request so far to both, in order.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.token = "hf_" + "t" * 20
        self.commit = COMMIT
        self.validators = True
        self.busy = 0
        self.seen: list[Request] = []
        self.faults: list[Fault] = []
        self._closing = threading.Event()
        self._hub = _listen(self, _Hub)
        self._cdn = _listen(self, _Cdn)
        self.endpoint = f"http://127.0.0.1:{self._hub.server_address[1]}"
        self.url = f"http://127.0.0.1:{self._cdn.server_address[1]}"

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.endpoint}

    def fault(self, **changes) -> Fault:
        self.faults.append(Fault(**changes))
        return self.faults[-1]

    def requests(self, pattern: str, method: str = "GET") -> list[Request]:
        return [r for r in self.seen if r.method == method and re.search(pattern, r.path)]


def _listen(hub: HubServer, handler: type[_Handler]) -> http.server.ThreadingHTTPServer:
    server = _Server(("127.0.0.1", 0), handler)
    server.hub = hub
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: HubServer

    def handle_error(self, *_: object) -> None:
        pass  # clients that go away are what these tests are about


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer: Callable[[_Handler], None]

    @property
    def hub(self) -> HubServer:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.seen.append(Request(self.command, self.path, headers))
        self.respond()

    do_HEAD = do_GET

    def respond(self) -> None:
        raise NotImplementedError

    def send(self, status: int, body: bytes = b"", /, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Hub(_Handler):
    def respond(self) -> None:
        if self.hub.busy > 0:
            self.hub.busy -= 1
            return self.send(503)
        path = urlsplit(self.path).path
        found = re.fullmatch(
            r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path
        )
        if found is not None:
            repo, kind, revision, folder = found.groups()
            # What a gated dataset is called and has anybody may know, but not what is in it.
            if self.allowed(repo, revision or "main", read=False):
                self.tree(repo, folder or "") if kind == "tree" else self.info(repo)
            return
        found = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        if found is None:
            self.send(404)
        elif self.allowed(found[1], found[2]):
            self.resolve(found[1], found[3])

    def allowed(self, repo: str, revision: str, read: bool = True) -> bool:
        authorized = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo not in self.hub.repos:
            self.send(401, X_Error_Code="RepoNotFound")
        elif read and repo in self.hub.gated and not authorized:
            status = 403 if "Authorization" in self.headers else 401
            self.send(status, X_Error_Code="GatedRepo")
        elif revision not in ("main", self.hub.commit):
            self.send(404, X_Error_Code="RevisionNotFound")
        else:
            return True
        return False

    def info(self, repo: str) -> None:
        record = {"id": repo, "sha": self.hub.commit, "siblings": [], "tags": [], "private": False}
        self.send(200, json.dumps(record).encode(), Content_Type="application/json")

    def tree(self, repo: str, folder: str) -> None:
        rows = [
            {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
            for path, data in self.hub.repos[repo].items()
            if not folder or path.startswith(folder + "/")
        ]
        self.send(200, json.dumps(rows).encode(), Content_Type="application/json")

    def resolve(self, repo: str, path: str) -> None:
        data = self.hub.repos[repo].get(path)
        if data is None:
            self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.hub.commit)
        elif len(data) < LFS_BYTES:
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            self.send(200, data, ETag=etag, X_Repo_Commit=self.hub.commit)
        else:
            digest = hashlib.sha256(data).hexdigest()
            self.send(
                302,
                X_Repo_Commit=self.hub.commit,
                X_Linked_ETag=f'"{digest}"',
                X_Linked_Size=str(len(data)),
                Location=f"{self.hub.url}/repos/{repo}/{path}?{SIGNATURE}",
            )


class _Cdn(_Handler):
    def respond(self) -> None:
        parts = urlsplit(self.path)
        data = self.content(parts.path, parse_qs(parts.query))
        fault = self.take_fault(parts.path)
        if fault.status:
            return self.send(fault.status, b"", **fault.headers)
        if fault.html:
            return self.send(200, b"<html>Please log in</html>", Content_Type="text/html")
        if data is None:
            return self.send(404)
        headers = dict(fault.headers)
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        if self.hub.validators:
            headers["ETag"] = etag
        start = self.first_byte(etag) if not fault.no_ranges else None
        if start is not None and start >= len(data):
            return self.send(416, Content_Range=f"bytes */{len(data)}")
        if start is None:
            return self.body(200, data, headers, fault)
        headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.body(206, data[start:], headers, fault)

    def content(self, path: str, query: dict[str, list[str]]) -> bytes | None:
        if path.startswith("/repos/"):
            _, _, owner, name, rest = path.split("/", 4)
            assert "Authorization" not in self.headers, "the token went to another host"
            if "Signature" not in query:
                return None
            return self.hub.repos[f"{owner}/{name}"].get(rest)
        return self.hub.files.get(path.lstrip("/"))

    def first_byte(self, etag: str) -> int | None:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if found is None or self.headers.get("If-Range", etag) != etag:
            return None
        return int(found[1])

    def take_fault(self, path: str) -> Fault:
        for fault in self.hub.faults:
            if fault.times > 0 and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return Fault()

    def body(self, status: int, data: bytes, headers: dict[str, str], fault: Fault) -> None:
        if fault.end is not None:
            headers["Connection"] = "close"
            self.close_connection = True
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[: fault.end])
            return
        part = fault.cut if fault.cut is not None else fault.hold
        if part is None and fault.drip is None:
            self.send(status, data, **headers)
            return
        length = headers.pop("Content_Length", str(len(data)))
        self.send(status, b"", **headers, Content_Length=length)
        if fault.drip is not None:
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(fault.drip)
            return
        self.wfile.write(data[:part])
        self.wfile.flush()
        fault.begun.set()
        if fault.hold is not None:
            self.hub._closing.wait()
        time.sleep(0.05)  # what was sent shall arrive before the reset does
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

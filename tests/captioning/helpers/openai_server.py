"""A server on loopback that speaks as much of OpenAI's API as captions need, and fails on request.

What it says about a picture is a function of the picture's bytes: `caption_of`. `with Server() as
server` runs it in a thread; `python -m tests.captioning.helpers.openai_server PORT` in a process
of its own, which can be killed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from aiohttp import web

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Request:
    """One that has arrived."""

    number: int  # 0, 1, … since the server began
    body: dict[str, Any]
    picture: bytes
    media_type: str
    headers: dict[str, str]

    @property
    def caption(self) -> str:
        return caption_of(self.picture)


#: What happens to a request: an answer, or None for the right one. May wait.
Behaviour = Callable[[Request], Any]


def caption_of(picture: bytes) -> str:
    return f"picture {hashlib.sha256(picture).hexdigest()[:16]}"


def completion(text: Any, reason: str | None = "stop", tokens: int | None = 7) -> dict[str, Any]:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        **({} if tokens is None else {"usage": {"completion_tokens": tokens}}),
    }


def stream(*chunks: Any, done: bool = True) -> bytes:
    """Server-sent events: each chunk a delta's text, or a whole chunk."""
    events = []
    for chunk in chunks:
        whole = {"choices": [{"index": 0, "delta": {"content": chunk}}]}
        events.append(f"data: {json.dumps(whole if isinstance(chunk, str) else chunk)}\n\n")
    return "".join([*events, "data: [DONE]\n\n" if done else ""]).encode()


def last_chunk(reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def error(status: int, message: str, **headers: str) -> web.Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "code": None}}
    return web.json_response(body, status=status, headers=headers)


class Server:
    """In a thread, on a port of its own.

    Attributes:
        seen: every request so far, in order of arrival.
        behave: what happens to the next ones.
        most: requests that were in its hands at once, at most.
    """

    def __init__(self, behave: Behaviour = lambda request: None, port: int = 0) -> None:
        self.behave = behave
        self.seen: list[Request] = []
        self.most = 0
        self._at_once = 0
        self._started: Future[int] = Future()
        self._port = port
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._started.result()}/v1"

    def __enter__(self) -> Server:
        self._thread.start()
        self._started.result(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post(PATH, self._answer)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self._port, shutdown_timeout=0.1, backlog=1024)
        await site.start()
        self._started.set_result(runner.addresses[0][1])
        await self._ended.wait()
        # A connection that is accepted while the server closes stays open (CPython #109564).
        await asyncio.sleep(0.05)
        await runner.cleanup()
        await asyncio.sleep(0.05)  # connections that were cut close

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self._at_once += 1
        self.most = max(self.most, self._at_once)
        try:
            body = json.loads(await request.read())
            content = body["messages"][-1]["content"]
            head, _, data = content[0]["image_url"]["url"].partition(";base64,")
            arrived = Request(
                len(self.seen),
                body,
                base64.b64decode(data, validate=True),
                head.removeprefix("data:"),
                dict(request.headers),
            )
            self.seen.append(arrived)
            found = self.behave(arrived)
            if asyncio.iscoroutine(found):
                found = await found
            if found is None:
                found = web.json_response(completion(arrived.caption))
            if found == "cut":  # the connection ends without an answer
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            return found
        finally:
            self._at_once -= 1


def main() -> None:
    """Port, and the seconds that each answer takes."""
    port, delay_s = int(sys.argv[1]), float(sys.argv[2])

    async def late(request: Request) -> None:
        await asyncio.sleep(delay_s)

    with Server(late, port) as server:
        print(server.url, flush=True)
        sys.stdin.read()  # until whoever began it hangs up


if __name__ == "__main__":
    main()

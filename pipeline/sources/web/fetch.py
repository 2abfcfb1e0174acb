"""Many links at once, from a thread: settings, and the answers in the order of the list."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Generator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

USER_AGENT = "Mozilla/5.0 (compatible; {token}/0.1; offline text-to-image data set builder)"

#: A site that turns away "img2dataset" by name means tools that read such lists: also this one.
KNOWN_AS = "img2dataset"


def listed(value: Any) -> Any:
    """A list as `--set` gives it: "noai,noindex"; "" is an empty one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


class HttpSettings(BaseModel):
    """How strangers' servers are asked. Limits hold for each worker process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timeout: Annotated[float, Field(gt=0)] = 10  # seconds without a byte, connecting included
    deadline: Annotated[float, Field(gt=0)] = 60  # seconds for one link, tries and waits included
    retries: Annotated[int, Field(ge=0)] = 2  # tries more, after 429, 5xx, resets, timeouts
    max_bytes: Annotated[int, Field(gt=0)] = 30_000_000  # of one picture
    max_redirects: Annotated[int, Field(ge=0)] = 5  # of one link
    thread_count: Annotated[int, Field(ge=1)] = 256  # links under way (no threads: img2dataset's
    # name is kept)
    host_concurrency: Annotated[int, Field(ge=1)] = 8  # connections to one host
    host_rate: Annotated[float, Field(ge=0)] = 20  # requests to one host a second; 0: no limit
    host_failures: Annotated[int, Field(ge=0)] = 20  # in a row, then a shard gives it up; 0: never
    #: The name that sites may call this crawler by, in robots.txt and X-Robots-Tag.
    user_agent_token: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "microdit"
    disallowed_header_directives: Annotated[tuple[str, ...], BeforeValidator(listed)] = (
        "noai",
        "noimageai",
        "noindex",
        "noimageindex",
    )  # of X-Robots-Tag; empty: the header is not looked at
    robots: bool = True  # honour robots.txt
    allow_private_hosts: bool = False  # also ask loopback, private and metadata addresses

    def tokens(self) -> tuple[str, ...]:
        """The names that sites may call this crawler by."""
        return (self.user_agent_token, KNOWN_AS)

    def user_agent(self) -> str:
        return USER_AGENT.format(token=self.user_agent_token)


class FetchError(Exception):
    """A link that gave no picture: `reason` as rejects have it, the message says what happened.

    It never quotes a link: its query may hold a signature.
    """

    def __init__(self, reason: str, detail: str) -> None:
        # A header's bytes that are no UTF-8 come as half surrogate pairs, which no parquet takes.
        super().__init__(detail.encode("utf-8", "backslashreplace").decode())
        self.reason = reason


def fetch_all(
    settings: HttpSettings, urls: Sequence[str], seam: Any = None
) -> Generator[bytes | FetchError, None, None]:
    """Each link's bytes, or why there are none, in the order of `urls`.

    Memory: the bytes that came and are not taken yet, and those on the way, stay below
    `http_client.MEMORY`, or one picture more. A generator that is closed early stops the rest.

    Args:
        seam: an `http_client.Seam`; tests put other resolvers and judges there.
    """
    if not urls:
        return
    from pipeline.sources.web.client import Client

    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def work() -> None:
        async with Client(settings, seam) as client:
            done.put(client)
            tasks = [asyncio.create_task(client.fetch(i, url)) for i, url in enumerate(urls)]
            stopping = asyncio.create_task(stop.wait())
            try:
                for task in tasks:
                    await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
                    if stop.is_set():
                        return
                    done.put(task.result())
                await stop.wait()  # what was taken last still gives its room back
            finally:
                stopping.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(stopping, *tasks, return_exceptions=True)

    def run() -> None:
        try:
            loop.run_until_complete(work())
        except BaseException as error:  # raised again by the consumer
            done.put(_Crash(error))
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())

    thread = threading.Thread(target=run, name="links", daemon=True)
    thread.start()
    try:
        client = _taken(done)
        for index in range(len(urls)):
            # Said here and not where results are put: only what the consumer waits for may
            # exceed the room.
            loop.call_soon_threadsafe(client.order.advance, index)
            found = _taken(done)
            yield found
            if isinstance(found, bytes):
                loop.call_soon_threadsafe(client.memory.give, len(found))
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


class _Crash(Exception):
    """The thread ended with an error of ours."""


def _taken(done: queue.SimpleQueue[Any]) -> Any:
    found = done.get()
    if isinstance(found, _Crash):
        raise found.args[0]
    return found

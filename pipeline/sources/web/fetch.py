"""Many links at once, from a thread, and the answers in the order of the list."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Generator, Sequence
from typing import Any

from pipeline.sources.web.client import Client
from pipeline.sources.web.settings import FetchError, HttpSettings


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

"""Captions from a server that speaks OpenAI's API: vLLM, SGLang, `transformers serve`, a service.

Best effort: which kernels and which neighbours a request meets is the server's business, so the
same picture may get another sentence next time. The captions say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import queue
import re
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from PIL import Image

from captioning.captioner import (
    Answer,
    BadPicture,
    BadSetting,
    Caption,
    Captioner,
    Failure,
    Picture,
)
from captioning.endpoint.answer import Said
from captioning.endpoint.client import TOO_MANY, Client, GaveUp, Refused
from captioning.endpoint.picture import as_it_is, encoded
from captioning.endpoint.settings import EndpointSettings

AHEAD = 8  # pictures made ready while others are in the server's hands
_SLOT = "<picture>"  # in a request's template


class EndpointCaptioner(Captioner):
    """Each picture is a request of its own, `concurrency` of them at once."""

    Settings = EndpointSettings
    settings: EndpointSettings
    best_effort = True
    workers = 1  # it waits; a second one doubles `concurrency`
    _answered = False  # the server has, at least once

    @property
    def revision(self) -> str:
        """What the server is asked for; what it runs under that name, nobody can know."""
        own = self.settings.revision
        return f"{self.settings.model}@{own}" if own else self.settings.model

    def label(self) -> str:
        model = re.sub(r"[^A-Za-z0-9._-]+", "--", self.settings.model.strip("/ ").replace(":", "-"))
        return f"{self.name}-{model}{self.settings.kind()}"

    def caption(self, pictures: Iterable[Picture]) -> Iterator[Answer]:
        settings = self.settings
        client = Client(settings, self.counters, self._answered)
        asked = _Asked(settings, client, _token_counter(settings.tokenizer))
        ready: queue.SimpleQueue[Future] = queue.SimpleQueue()
        in_hand: set[Future] = set()

        def next_answer() -> Answer:
            with self.spent("wait"):
                future = ready.get()
            in_hand.discard(future)
            key, found = future.result()
            if isinstance(found, Failure):
                return key, found
            return key, [self._caption(number, said) for number, said in enumerate(found)]

        with _Loop(client) as loop:
            try:
                for picture in pictures:
                    if len(in_hand) == settings.concurrency + AHEAD:
                        yield next_answer()
                    # Nothing is decoded here, or the server would wait for us.
                    future = loop.start(asked.answer(picture, as_it_is(picture.data)))
                    in_hand.add(future)
                    future.add_done_callback(ready.put)
                while in_hand:
                    yield next_answer()
            finally:
                self._answered = client.answered
                for future in in_hand:
                    future.cancel()

    def _caption(self, number: int, said: Said) -> Caption:
        return Caption(
            said.text.strip(),
            self.name,
            self.revision,
            self.settings.prompt_of(number).text,
            said.tokens,
            said.finish_reason,
            best_effort=True,
            number=number,
        )


class _Asked:
    """What is asked about pictures, in the loop's thread."""

    def __init__(
        self, settings: EndpointSettings, client: Client, count: Callable[[str], int] | None
    ) -> None:
        self.settings = settings
        self.client = client
        self.count = count
        self.turns = asyncio.Semaphore(settings.concurrency)
        self.judging = asyncio.Lock()
        self.templates = [_template(settings, number) for number in range(settings.number)]

    async def answer(self, picture: Picture, url: bytes | None) -> tuple[str, list[Said] | Failure]:
        """Every caption of one picture, or why it has none.

        Args:
            url: the picture as a data URL; None: it has to be opened.
        """
        async with self.turns:
            found = await self._said(picture, url)
        if not isinstance(found, Failure):
            for said in found:
                if said.refusal or said.finish_reason == "content_filter":
                    self.client.counters["refusals"] += 1
                    why = said.refusal or "content filter"
                    return picture.key, Failure("refused by the model", why)
        return picture.key, found

    async def _said(self, picture: Picture, url: bytes | None) -> list[Said] | Failure:
        suspect = False
        while True:
            try:
                if url is None:
                    url = await asyncio.to_thread(lambda: encoded(picture.open()))
                return [await self._ask(picture.key, n, url) for n in range(self.settings.number)]
            except BadPicture as error:
                return Failure(error.reason, str(error))
            except (Refused, GaveUp) as error:
                fault = error
            try:  # what the server stumbles over may be no picture
                await asyncio.to_thread(picture.open)
            except BadPicture as error:
                return Failure(error.reason, str(error))
            if isinstance(fault, Refused):
                if not self.client.answered:
                    await self._ordinary_passes(fault)
                return Failure("refused by the server", str(fault))
            passes = await self._ordinary_passes(fault)
            if passes and (fault.alone or suspect):
                return Failure(f"server: {fault.reason}", str(fault))
            # The server was away, or no other request was there to tell. Once more.
            suspect = passes

    async def _ask(self, key: str, number: int, url: bytes) -> Said:
        said = await self.client.ask(self._body(key, number, url))
        if said.tokens is None and self.count is not None:
            return Said(said.text, self.count(said.text), said.finish_reason, said.refusal)
        return said

    def _body(self, key: str, number: int, url: bytes) -> bytes:
        # JSON has nothing to escape in a data URL, so that it need not go through an encoder.
        head, tail = self.templates[number]
        seed = self.settings.noise_seed(key, number) & 0x7FFFFFFF  # as large as any server takes
        noise = b', "seed": %d}' % seed if self.settings.temperature else b"}"
        return b"".join((head, url, tail, noise))

    async def _ordinary_passes(self, fault: Refused | GaveUp) -> bool:
        """Whether the server answers an ordinary picture right now; waits until it does.

        Raises:
            BadSetting: it does not.
        """
        settings = self.settings
        where = f"url={settings.url}, model={settings.model}: "
        if isinstance(fault, GaveUp) and fault.reason == TOO_MANY:
            raise BadSetting(
                f"{where}{fault}, {settings.retries + 1} times; lower "
                f"concurrency={settings.concurrency}, or run again later: what is done stays done"
            )
        body = self._body("", 0, _ordinary())
        try:
            async with self.judging:
                with contextlib.suppress(GaveUp):
                    await self.client.ask(body, 1)  # one: a server may hang up after an error
                    return True
                await self.client.ask(body)
                return False
        except Refused as again:
            raise BadSetting(
                f"{where}takes not even an ordinary picture: {again}; is it a model that sees "
                f"pictures, and has it room for max_tokens={settings.max_tokens}?"
            ) from again
        except GaveUp as again:
            raise BadSetting(
                f"{where}no answer, {settings.retries + 1} times and more: {again}; see to the "
                "server and run again: what is done stays done"
            ) from again


class _Loop:
    """An event loop in a thread of its own, with a client that is open there."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, name="endpoint", daemon=True)

    def __enter__(self) -> _Loop:
        self._thread.start()
        self._opened.result()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def start(self, work: Coroutine[Any, Any, Any]) -> Future:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _work(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            if self._opened.done():
                raise
            self._opened.set_exception(error)

    async def _run(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        async with self.client:
            self._opened.set_result(None)
            await self._ended.wait()


def _token_counter(tokenizer: str) -> Callable[[str], int] | None:
    """Counts a text's tokens, without those that begin and end it.

    Raises:
        BadSetting: it is no folder or cached hub repo with a tokenizer.json.
    """
    if not tokenizer:
        return None
    from tokenizers import Tokenizer

    file = Path(tokenizer, "tokenizer.json")
    if not Path(tokenizer).is_dir():
        file = _cached(tokenizer, file.name)
    if file is None or not file.is_file():
        raise BadSetting(
            f"tokenizer={tokenizer}: no folder with a tokenizer.json, nor a repo with one in the "
            "local hub cache; leave it empty where the server counts tokens itself"
        )
    try:
        found = Tokenizer.from_file(str(file))
    except Exception as error:  # whatever its parser, which is written in Rust, makes of the file
        raise BadSetting(f"tokenizer={tokenizer}: {file.name}: {error}") from error
    return lambda text: len(found.encode(text, add_special_tokens=False).ids)


def _cached(repo: str, file: str) -> Path | None:
    """A file of a hub repo, "owner/name[@revision]", in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    own, _, revision = repo.partition("@")
    try:
        found = try_to_load_from_cache(own, file, revision=revision or None)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _template(settings: EndpointSettings, number: int) -> tuple[bytes, bytes]:
    """A request for one caption before and after the picture, without its last brace."""
    content = [
        {"type": "image_url", "image_url": {"url": _SLOT}},
        {"type": "text", "text": settings.prompt_of(number).text},
    ]
    request = {
        "messages": [{"role": "user", "content": content}],
        "model": settings.model,
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "stream": False,
    }
    head, _, tail = json.dumps(request).removesuffix("}").partition(_SLOT)
    return head.encode(), tail.encode()


@functools.cache
def _ordinary() -> bytes:
    """A picture that every server can read: a grey gradient, 256 x 256."""
    return encoded(Image.linear_gradient("L").convert("RGB"))

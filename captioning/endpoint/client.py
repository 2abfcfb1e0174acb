"""Requests to a server that speaks OpenAI's API: until it answers, or it is clear that it will not.

Three things can be wrong. The setting: an address without a server, a key or a model that it does
not know; that is a BadSetting at once. The moment: too many requests, an overload, a server that is
restarted; that is waited for. And the request itself, which is the caller's to judge.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import replace
from email.utils import parsedate_to_datetime

import aiohttp

from captioning.captioner import BadSetting
from captioning.clean import one_line
from captioning.endpoint.answer import Said, Unreadable, error_text, read
from captioning.endpoint.settings import KEY_VARIABLE, EndpointSettings, completions_url, read_key

MAX_ANSWER = 4_000_000  # bytes
SAID = 200  # characters of what a server says that are passed on
MAX_PAUSE_S = 60.0  # between two tries
SHORT_PAUSE_S = 4.0  # at most, where the server is there and stumbles
LONGEST_WAIT_S = 600.0  # that a Retry-After may ask for
CROWDED_S = 300.0  # "too many requests" is no failure while this long somebody gets through
CONNECT_S = 10.0
FIRST_TRIES = 4  # to reach a server that has never answered: about seven seconds

TOO_MANY, UNREADABLE = "too many requests", "unreadable answer"  # reasons of faults

_STUMBLES = {"500", UNREADABLE}
_STOP = {401: "the key", 402: "the account", 403: "the key"}  # status -> what it concerns
_WAIT = {408, 409, 425, 429}  # and 500 to 599
_ELSEWHERE = {404, 405, 410, 501}  # and 300 to 399: no such API here, or no such model


class Refused(Exception):
    """The server will not have this request: 400, 413, 422."""


class GaveUp(Exception):
    """Tried as often as was asked for. The message is the last thing that went wrong.

    Attributes:
        alone: other requests were answered meanwhile.
    """

    def __init__(self, fault: _Fault, alone: bool) -> None:
        super().__init__(str(fault))
        self.reason = fault.reason
        self.alone = alone


class Client:
    """Asks and waits, in one event loop and in an `async with`.

    Args:
        counters: is told how many requests there were, and of each fault.
        answered: the server is known to answer: address, key and model are right.
    """

    def __init__(self, settings: EndpointSettings, counters: Counter[str], answered: bool) -> None:
        self.settings = settings
        self.counters = counters
        self.answered = answered
        self._url = completions_url(settings.url)
        self._key = read_key()
        self._first = asyncio.Lock()
        self._answers = 0
        self._answered_at = self._closed_until = time.monotonic()

    async def __aenter__(self) -> Client:
        headers = {"Content-Type": "application/json", "User-Agent": "microdit"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            # The caller bounds how many connections there are.
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.settings.timeout_s, sock_connect=CONNECT_S),
            headers=headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await asyncio.sleep(0)  # in which its connections close

    async def ask(self, body: bytes, retries: int | None = None) -> Said:
        """The answer to a request's body. Until there has been one, requests go one at a time: some
        servers load the model with the first, and come to grief when two do it at once.

        Raises:
            Refused: the server does not take this request.
            GaveUp: no try brought an answer.
            BadSetting: no request will be answered.
        """
        if not self.answered:
            async with self._first:
                if not self.answered:
                    return await self._ask(body, retries)
        return await self._ask(body, retries)

    async def _ask(self, body: bytes, retries: int | None) -> Said:
        retries = self.settings.retries if retries is None else retries
        tries = answers = 0
        while True:
            if self._closed_until > time.monotonic():  # the server asked everybody to wait
                spread = random.uniform(0, min(1.0, self.settings.backoff_s))
                await asyncio.sleep(self._closed_until - time.monotonic() + spread)
                continue
            self.counters["requests"] += 1
            try:
                said = await self._try(body)
            except _Fault as fault:
                self.counters[f"requests that failed: {fault.reason}"] += 1
                tries += 1
                answers = answers if tries > 1 else self._answers
                self._hopeless(fault, tries)
                # Whoever is told to slow down has his turn later, as long as others get through.
                crowded = time.monotonic() - self._answered_at < CROWDED_S
                if tries > retries and not (fault.reason == TOO_MANY and crowded):
                    raise GaveUp(fault, self._answers > answers) from fault
                self._closed_until = max(self._closed_until, time.monotonic() + fault.wait_s)
                longest = SHORT_PAUSE_S if fault.reason in _STUMBLES else MAX_PAUSE_S
                pause = min(longest, self.settings.backoff_s * 2 ** min(tries - 1, 16))
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                continue
            self.answered = True
            self._answers += 1
            self._answered_at = time.monotonic()
            return said

    def _hopeless(self, fault: _Fault, tries: int) -> None:
        """Raises BadSetting where more tries would be of no use."""
        if fault.wait_s > LONGEST_WAIT_S:
            raise BadSetting(
                f"url={self._url}: asks to wait {fault.wait_s:.0f} s ({fault}); run again "
                "later: what is done stays done"
            )
        if fault.reason == "unreachable" and not self.answered and tries >= FIRST_TRIES:
            raise BadSetting(
                f"url={self._url}: no server answers ({fault}); start it, or give its "
                "address, e.g. http://127.0.0.1:8000/v1"
            )

    async def _try(self, body: bytes) -> Said:
        try:
            # A redirect would turn the POST into a GET and might take the key elsewhere.
            request = self._session.post(self._url, data=body, allow_redirects=False)
            async with request as response:
                answer = await _whole(response)
                status, wait_s = response.status, _wait(response.headers.get("Retry-After"))
        except aiohttp.ConnectionTimeoutError as error:
            raise _Fault("unreachable", f"no connection within {CONNECT_S:.0f} s") from error
        except TimeoutError as error:
            detail = f"no whole answer within {self.settings.timeout_s:g} s"
            raise _Fault("timeout", detail) from error
        except (aiohttp.ClientError, OSError) as error:
            never = isinstance(error, aiohttp.ClientConnectorError)
            reason = "unreachable" if never else "connection lost"
            raise _Fault(reason, self._said(f"{type(error).__name__}: {error}")) from error
        if status != 200:
            raise self._of_status(status, answer, wait_s)
        try:
            said = read(answer)
            return replace(said, refusal=self._said(said.refusal)) if said.refusal else said
        except Unreadable as error:
            detail = self._said(f"the answer is {error}")
            if not self.answered and answer.lstrip().startswith(b"<"):
                raise BadSetting(
                    f"url={self._url}: {detail}; give the address of the API, e.g. "
                    "http://127.0.0.1:8000/v1"
                ) from error
            raise _Fault(UNREADABLE, detail) from error

    def _of_status(self, status: int, body: bytes, wait_s: float) -> Exception:
        said = self._said(f"{status}: {error_text(body)}")
        where = f"url={self._url}: {said}"
        if status in _STOP or (status == 429 and b"insufficient_quota" in body):
            what = _STOP.get(status, "the account")
            return BadSetting(f"{where}; see to {what}; the key comes from ${KEY_VARIABLE}")
        if status in _WAIT or (status >= 500 and status != 501):
            return _Fault(TOO_MANY if status == 429 else str(status), said, wait_s)
        if status < 400 or status in _ELSEWHERE:
            if self.answered:  # behind a proxy, while the server is restarted
                return _Fault(str(status), said, wait_s)
            return BadSetting(
                f"{where}; model={self.settings.model}: give the model by the name under which it "
                "is served, and the address of the API, e.g. http://127.0.0.1:8000/v1"
            )
        return Refused(said)

    def _said(self, text: str) -> str:
        """One short line that may be printed: without the key, nor a piece of it at the end."""
        line = one_line(text)
        line = line.replace(self._key, "***") if self._key else line
        return line if len(line) <= SAID else line[: SAID - 3] + "..."


class _Fault(Exception):
    """What may be over in a moment."""

    def __init__(self, reason: str, detail: str, wait_s: float = 0.0) -> None:
        super().__init__(detail)
        self.reason = reason
        self.wait_s = wait_s


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER:
            raise _Fault(UNREADABLE, f"the answer is over {MAX_ANSWER} bytes long")
    return b"".join(parts)


def _wait(retry_after: str | None) -> float:
    """Seconds; the header holds them or a date."""
    if not retry_after:
        return 0.0
    try:
        return min(max(0.0, float(retry_after)), 1e9)
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0

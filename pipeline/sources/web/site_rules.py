"""Each site's robots.txt, asked for once and remembered by the process."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from yarl import URL

from pipeline.sources.web import robots
from pipeline.sources.web.address import Refused
from pipeline.sources.web.answer import REDIRECTS, Answer, Transient
from pipeline.sources.web.settings import FetchError

VALID_S = 24 * 3600  # how long one is believed (RFC 9309)
SITES = 20_000  # that a process remembers
REDIRECTS_FOLLOWED = 5  # as the RFC asks at least

Rules = tuple[tuple[str, robots.Rules], ...]  # (token, its rules)


class SiteRules:
    """Of one client; `get` makes one request and follows no redirect."""

    def __init__(
        self,
        tokens: tuple[str, ...],
        timeout_s: float,
        get: Callable[[URL], Awaitable[Answer]],
        redirected: Callable[[URL, Answer], URL],
    ) -> None:
        self._tokens = tokens
        self._timeout_s = timeout_s
        self._get = get
        self._redirected = redirected
        self._asked: dict[URL, asyncio.Task[Rules]] = {}

    async def permit(self, url: URL) -> None:
        """Returns where a link may be asked for.

        Raises:
            FetchError: "opted-out".
            Transient: robots.txt cannot be had now: a server that fails forbids all.
        """
        origin = url.origin()
        for token, rules in _recalled(origin, self._tokens) or await self._learned(origin):
            if not rules.allow(url.raw_path_qs):
                raise FetchError("opted-out", f"robots.txt of {url.host} forbids it to {token}")

    async def close(self) -> None:
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    async def _learned(self, origin: URL) -> Rules:
        """By one request, however many links of the site wait for it."""
        task = self._asked.get(origin)
        if task is None:
            task = self._asked[origin] = asyncio.create_task(self._ask(origin))
            task.add_done_callback(lambda done: self._forget(origin, done))
        return await asyncio.shield(task)

    def _forget(self, origin: URL, task: asyncio.Task[Rules]) -> None:
        del self._asked[origin]  # what failed is asked for again by the next try
        if not task.cancelled():
            task.exception()  # seen, also where all who waited are gone

    async def _ask(self, origin: URL) -> Rules:
        try:
            async with asyncio.timeout(self._timeout_s):
                text = await self._text(origin.with_path("/robots.txt"))
        except Refused:  # then the picture is, too, or the site has led robots.txt astray
            text = ""
        except FetchError as error:  # no such host, a bad certificate: another try changes nothing
            raise FetchError(error.reason, f"{error} (asked for robots.txt)") from error
        except (Transient, TimeoutError) as error:
            why = str(error) or f"not there after {self._timeout_s:g} s"
            raise Transient(f"robots.txt: {why}") from error
        rules = tuple((token, robots.parse(text, token)) for token in self._tokens)
        _known[origin, self._tokens] = (time.monotonic(), rules)
        while len(_known) > SITES:
            _known.popitem(last=False)
        return rules

    async def _text(self, url: URL) -> str:
        for _ in range(REDIRECTS_FOLLOWED + 1):
            answer = await self._get(url)
            if answer.status >= 500:
                raise Transient(f"HTTP {answer.status}")
            if answer.status not in REDIRECTS:  # what is not there (4xx) has no body here
                return answer.body.decode("utf-8-sig", "replace")
            url = self._redirected(url, answer)
        return ""


def _recalled(origin: URL, tokens: tuple[str, ...]) -> Rules | None:
    learned, rules = _known.get((origin, tokens), (0.0, None))
    return rules if rules is not None and time.monotonic() - learned < VALID_S else None


_known: OrderedDict[tuple[URL, tuple[str, ...]], tuple[float, Rules]] = OrderedDict()

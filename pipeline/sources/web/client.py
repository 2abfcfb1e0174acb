"""HOW a link is fetched: a pooled client with tries, redirects, deadlines and limits a host."""

from __future__ import annotations

import asyncio
import functools
import random
import ssl
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from pipeline.sources.web import robots
from pipeline.sources.web.address import (
    Judge,
    JudgedResolver,
    Refused,
    anyone,
    parse,
    public_only,
    spelled,
)
from pipeline.sources.web.answer import (
    AGAIN,
    GIVEN,
    REDIRECTS,
    Answer,
    Transient,
    drain,
    explained,
    read_picture,
    read_start,
    retry_after,
)
from pipeline.sources.web.limits import Limiter, Order
from pipeline.sources.web.settings import FetchError, HttpSettings
from pipeline.sources.web.site_rules import SiteRules

MEMORY = 512_000_000  # bytes of bodies that came, or are coming, and were not taken yet
LOOKUPS = 64  # names resolved at once
HEADER_BYTES = 100_000  # of one header of an answer, as curl takes; aiohttp would take 8 KB
BACKOFF_S = 0.5  # before the second try; twice as long before each further one, give or take half


@dataclass(frozen=True)
class Hooks:
    """Who resolves names and who judges addresses."""

    resolver: AbstractResolver | None = None  # default: the machine's
    judge: Judge | None = None  # default: as `allow_private_hosts` says


@dataclass
class _Host:
    room: Limiter
    next_at: float = 0.0  # of the loop's clock: when the rate allows the next request
    paused_until: float = 0.0  # as the host asked
    failures: int = 0  # links in a row


@dataclass
class _Link:
    """A link on its way."""

    index: int
    at: URL  # where its redirects have led
    clock: _Clock


class Client:
    """The connections of one shard. A host that keeps failing is given up for the shard."""

    def __init__(self, settings: HttpSettings, seam: Hooks | None = None) -> None:
        seam = seam or Hooks()
        self.settings = settings
        self.order = Order()
        self.memory = Limiter(max(MEMORY, settings.max_bytes), self.order)
        self._judge = seam.judge or (anyone if settings.allow_private_hosts else public_only)
        self._resolver = seam.resolver
        self._room = Limiter(settings.thread_count, self.order)
        self._hosts: dict[str, _Host] = {}
        self._rules = SiteRules(settings.tokens(), settings.timeout, self._robots, self._redirected)

    async def __aenter__(self) -> Client:
        s = self.settings
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(LOOKUPS))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the rooms limit
                resolver=JudgedResolver(self._resolver or aiohttp.ThreadedResolver(), self._judge),
                ttl_dns_cache=300,
                ssl=tls(),
            ),
            # Identity: compressing pictures gains nothing, and lengths can be compared.
            headers={"User-Agent": s.user_agent(), "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(sock_connect=s.timeout, sock_read=s.timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=2**18,
            max_line_size=HEADER_BYTES,
            max_field_size=HEADER_BYTES,
            trust_env=False,  # a proxy would resolve names itself, past the judge
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._rules.close()
        await self._session.close()

    async def fetch(self, index: int, url: str) -> bytes | FetchError:
        """A link's bytes, which hold room of `memory` until they are given back."""
        try:
            target = parse(url, self._judge)
        except Refused as error:
            return FetchError("refused", str(error))
        seconds = self.settings.deadline
        try:
            async with asyncio.timeout(None) as timeout:
                link = _Link(index, target, _Clock(timeout, seconds))
                return await self._tried(link)
        except Refused as error:
            return FetchError("refused", str(error))
        except FetchError as error:
            return error
        except TimeoutError:
            self._host(link.at).failures += 1
            return FetchError("failed_to_download", f"not whole after {seconds:g} s, the deadline")

    async def _tried(self, link: _Link) -> bytes:
        tries = self.settings.retries + 1
        start = link.at
        for attempt in range(tries):
            link.at = start
            try:
                body = await self._followed(link)
            except Transient as error:
                wait = BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5)
                if error.wait_s is not None:
                    wait = error.wait_s + random.uniform(0, 1)
                if attempt + 1 == tries or wait > link.clock.left():
                    self._host(link.at).failures += 1
                    detail = f"{error} (try {attempt + 1} of {tries})"
                    if error.wait_s is not None:
                        detail += f"; it asks to wait {error.wait_s:.0f} s"
                    raise FetchError("failed_to_download", detail) from error
                await asyncio.sleep(wait)
            else:
                self._host(link.at).failures = 0
                return body
        raise AssertionError("unreachable")

    async def _followed(self, link: _Link) -> bytes:
        for _ in range(self.settings.max_redirects + 1):
            async with self._admitted(link):
                if self.settings.robots:
                    await self._rules.permit(link.at)
                answer = await self._asked(link)
            if answer.status not in REDIRECTS:
                return answer.body
            link.at = self._redirected(link.at, answer)
        raise FetchError("failed_to_download", f"over {self.settings.max_redirects} redirects")

    @asynccontextmanager
    async def _admitted(self, link: _Link) -> AsyncIterator[None]:
        """A turn at the host, then one of the connections; to wait for them costs a link no time.

        In this order, so that links that wait for a slow host keep no others away.
        """
        host, index = self._host(link.at), link.index
        async with link.clock.stopped():
            await host.room.take(index)
        try:
            limit = self.settings.host_failures
            if limit and host.failures >= limit:
                raise FetchError(
                    "failed_to_download",
                    f"{link.at.host} is given up after {limit} failures in a row",
                )
            async with link.clock.stopped():
                await self._paced(link.at)
                await self._room.take(index)
            try:
                yield
            finally:
                self._room.give()
        finally:
            host.room.give()

    async def _paced(self, url: URL) -> None:
        """Waits until the host may be asked again."""
        host, now = self._host(url), asyncio.get_running_loop().time()
        pause = host.paused_until - now
        if pause > self.settings.deadline:
            raise FetchError("failed_to_download", f"{url.host} asks to wait {pause:.0f} s")
        start = max(now, host.next_at, host.paused_until)
        if self.settings.host_rate:
            host.next_at = start + 1 / self.settings.host_rate
        if start > now:
            await asyncio.sleep(start - now)

    async def _asked(self, link: _Link) -> Answer:
        """One request for a picture; a status that is neither a picture's nor a redirect's is an
        error."""
        s, url = self.settings, link.at
        with explained(url, s.timeout):
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status in AGAIN:
                    raise self._again(url, response)
                tags = response.headers.getall("X-Robots-Tag", [])
                directive = robots.opt_out(tags, s.tokens(), s.disallowed_header_directives)
                if directive is not None:
                    raise FetchError("opted-out", f"X-Robots-Tag: {directive}")
                if response.status in REDIRECTS:
                    await drain(response)
                    return Answer(response.status, response.headers)
                if response.status not in GIVEN:
                    await drain(response)
                    self._host(url).failures = 0  # it answers
                    raise FetchError("failed_to_download", f"HTTP {response.status}")
                return Answer(200, response.headers, await self._body(link, response))

    async def _body(self, link: _Link, response: aiohttp.ClientResponse) -> bytes:
        limit, expected = self.settings.max_bytes, response.content_length
        if expected is not None and expected > limit:
            raise FetchError("too-large", f"{expected:,} bytes; the limit is {limit:,}")
        held = limit if expected is None else expected
        async with link.clock.stopped():
            await self.memory.take(link.index, held)
        kept = 0
        try:
            body = await read_picture(response, limit)
            kept = len(body)
            return body
        finally:
            self.memory.give(held - kept)

    def _again(self, url: URL, response: aiohttp.ClientResponse) -> Transient:
        wait = retry_after(response.headers.get("Retry-After"))
        if wait is not None:  # all who ask this host wait
            host = self._host(url)
            until = asyncio.get_running_loop().time() + wait
            host.paused_until = max(host.paused_until, until)
        return Transient(f"HTTP {response.status}", wait)

    async def _robots(self, url: URL) -> Answer:
        """One request for robots.txt."""
        with explained(url, self.settings.timeout):
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status in AGAIN:
                    raise self._again(url, response)
                body = b""
                if response.status in GIVEN:
                    body = await read_start(response, robots.MAX_BYTES)
                return Answer(response.status, response.headers, body)

    def _redirected(self, url: URL, answer: Answer) -> URL:
        """Where a redirect leads, judged like any link."""
        location = answer.headers.get("Location", "")
        if not location:
            raise FetchError("failed_to_download", f"HTTP {answer.status} without a Location")
        try:
            joined = str(url.join(URL(spelled(location), encoded=True)))
            return parse(joined, self._judge)
        except (ValueError, IndexError):  # as in parse()
            raise Refused("a redirect to what is no link") from None
        except Refused as error:
            raise Refused(f"a redirect to {error}") from None

    def _host(self, url: URL) -> _Host:
        name = url.raw_host or ""
        found = self._hosts.get(name)
        if found is None:
            room = Limiter(self.settings.host_concurrency, self.order)
            found = self._hosts[name] = _Host(room)
        return found


class _Clock:
    """A link's deadline, which stands still while the link waits for its turn."""

    def __init__(self, timeout: asyncio.Timeout, seconds: float) -> None:
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        timeout.reschedule(self._loop.time() + seconds)

    def left(self) -> float:
        return (self._timeout.when() or 0.0) - self._loop.time()

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        left = self.left()
        self._timeout.reschedule(None)
        try:
            yield
        finally:
            self._timeout.reschedule(self._loop.time() + left)


@functools.cache
def tls() -> ssl.SSLContext:
    """One for the process: to load the certificates takes 30 ms. SSL_CERT_FILE names others."""
    return ssl.create_default_context()

"""WHO may be asked: http(s) on public addresses, judged where the connection is made.

A list of links is written by strangers. Left alone, `http://169.254.169.254/…` in it reads the
credentials of the cloud machine that downloads, and a name that resolves to a public address when
it is checked and to a private one when it is used ("rebinding") gets around a check beforehand. So
the resolver of the connector itself leaves out what may not be asked: there is no second lookup.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from aiohttp import InvalidURL
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pipeline.core.urls import stripped

Judge = Callable[[str], str | None]  # an address -> why it may not be asked, or None


class Refused(Exception):
    """An address or scheme that may not be asked; the message says which and why."""


def parse(url: str, judge: Judge) -> URL:
    """A link as it will be asked for.

    What is already encoded stays as it is: another spelling of the query breaks a signature.

    Raises:
        Refused: another scheme than http(s), no host, or an address in the link that may not be
            asked. A name is judged when it is resolved.
    """
    url = stripped(url)
    try:
        found = URL(url)
        if _ENCODED.fullmatch(url):
            literal = URL(url, encoded=True)
            found = literal if literal.host == found.host else found
        scheme, host, _ = found.scheme, found.raw_host, found.port
    except (ValueError, IndexError, InvalidURL):  # IndexError: yarl's, of "http://[::1]@"
        raise Refused("not a link") from None
    if scheme not in ("http", "https"):
        raise Refused(f"scheme {scheme[:20] or 'missing'}: only http and https are followed")
    if not host:
        raise Refused("a link without a host")
    last = host.rstrip(".").rpartition(".")[2]
    if ":" in host or last.isdigit() or last.lower().startswith("0x"):
        # To the C library 2130706433, 0x7f.1 and 0177.0.0.1 are all 127.0.0.1.
        try:
            address = str(ipaddress.ip_address(host))
        except ValueError:
            raise Refused(f"host {host[:80]}: an address in an unusual form") from None
        if why := judge(address):
            raise Refused(f"{address}: {why}{_way_in(judge)}")
    elif not _NAME.fullmatch(host) or len(host) > 254:
        raise Refused(f"host {host[:80]!r}: no name")
    return found


def spelled(location: str) -> str:
    """A Location header as a link: in it bytes that are no ASCII stand for themselves, whatever
    their encoding; only a host's name has to be text.

    Args:
        location: as aiohttp reads headers: bytes that are no UTF-8 as half surrogate pairs.
    """
    head, rest = _AUTHORITY.fullmatch(location).groups("")  # pyright: ignore
    if not head.isascii():
        raw = head.encode("utf-8", "surrogateescape")
        try:
            head = str(URL(raw.decode())).rstrip("/")
        except UnicodeDecodeError:
            head = str(URL(raw.decode("latin-1"))).rstrip("/")
    data = rest.encode("utf-8", "surrogateescape")
    return head + "".join(chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in data)


def public_only(address: str) -> str | None:
    """Why an address may not be asked, None for one of the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a zone: fe80::1%eth0
        return "a link-local address"
    for network, name in _NAMED:
        if ip.version == network.version and ip in network:
            return name
    if ip.version == 6 and ip not in _UNICAST:
        return "not a public address"
    # Multicast and reserved blocks are in part "global" to Python.
    if not ip.is_global or ip.is_multicast or ip.is_reserved:
        return "not a public address"
    return None


def _way_in(judge: Judge) -> str:
    return "; --allow-private-hosts lets links lead there" if judge is public_only else ""


def anyone(address: str) -> str | None:
    """The judge of `allow_private_hosts`: every address may be asked."""
    return None


class JudgedResolver(AbstractResolver):
    """Leaves out the addresses that may not be asked, so that nothing connects to them.

    Raises:
        Refused: none is left.
    """

    def __init__(self, inner: AbstractResolver, judge: Judge) -> None:
        self._inner = inner
        self._judge = judge

    async def resolve(self, host: str, port: int = 0, family=0) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        verdicts = [(entry, self._judge(entry["host"])) for entry in found]
        allowed = [entry for entry, why in verdicts if why is None]
        if found and not allowed:
            entry, why = verdicts[0]
            raise Refused(f"{host} is {entry['host']}: {why}{_way_in(self._judge)}")
        return allowed

    async def close(self) -> None:
        await self._inner.close()


_AUTHORITY = re.compile(r"((?:[^:/?#]+:)?//[^/?#]*)?(.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")  # international ones as xn--…
_ENCODED = re.compile(r"[!-~]+")  # ASCII without spaces
_UNICAST = ipaddress.ip_network("2000::/3")  # all that is routed in public
_NAMED = tuple(
    (ipaddress.ip_network(network), name)
    for network, name in (
        ("169.254.0.0/16", "a link-local address (cloud metadata)"),
        ("fd00:ec2::/32", "a cloud's metadata address"),
        ("168.63.129.16/32", "a cloud's metadata address"),  # Azure's; public by its number
        ("192.0.0.0/24", "an address for protocols (a cloud's metadata)"),
        ("3fff::/20", "an address of documentation"),  # newer than Python 3.11's tables
        ("100.64.0.0/10", "an address of a carrier's or cloud's inner network"),
        ("127.0.0.0/8", "a loopback address"),
        ("::1/128", "a loopback address"),
        ("fe80::/10", "a link-local address"),
        ("fec0::/10", "a site-local address"),
        ("10.0.0.0/8", "a private address"),
        ("172.16.0.0/12", "a private address"),
        ("192.168.0.0/16", "a private address"),
        ("fc00::/7", "a private address"),
        # What carries an IPv4 address within, and could carry any.
        ("::/96", "an IPv4 address in IPv6 form"),
        ("::ffff:0:0/96", "an IPv4 address in IPv6 form"),
        ("::ffff:0:0:0/96", "an IPv4 address in IPv6 form"),
        ("64:ff9b::/96", "an IPv4 address in IPv6 form (NAT64)"),
        ("64:ff9b:1::/48", "an IPv4 address in IPv6 form (NAT64)"),
        ("2001::/32", "an IPv4 address in IPv6 form (Teredo)"),
        ("2002::/16", "an IPv4 address in IPv6 form (6to4)"),
    )
)

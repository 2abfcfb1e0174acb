"""Links of a URL list that should reach what they must not, or never end.

`SERVER` in a link stands for a server on loopback: its case wants `allow_private_hosts`, and the
refusal of private addresses is then no part of it. All others run without.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.hostile.case import SAMPLE, Case

REFUSED = "refused"
FAILED = "failed_to_download"
SERVER = "http://SERVER"


@dataclass(frozen=True)
class Link(Case):
    """A case whose `make` gives the link."""

    local: bool = False  # runs against the loopback server, with private hosts allowed


def _link(name: str, verdict: str, why: str, url: str) -> Link:
    return Link(name, verdict, why, url.encode, SERVER in url)


CASES: list[Link] = [
    # Not http.
    _link("file", REFUSED, "file:", "file:///etc/passwd"),
    _link("file-host", REFUSED, "file: with a host", "file://localhost/etc/passwd"),
    _link("ftp", REFUSED, "ftp:", "ftp://example.com/a.jpg"),
    _link("data", REFUSED, "data:", "data:image/png;base64,iVBORw0KGgo="),
    _link("javascript", REFUSED, "javascript:", "javascript:alert(1)"),
    _link("gopher", REFUSED, "gopher:", "gopher://127.0.0.1:6379/_FLUSHALL"),
    _link("pipe", REFUSED, "webdataset's pipe:", "pipe:cat /etc/passwd"),
    _link("s3", REFUSED, "s3: with the machine's own rights", "s3://bucket/secret.jpg"),
    _link("shouted", REFUSED, "FILE: in upper case", "FILE:///etc/passwd"),
    _link("no-scheme", REFUSED, "no scheme", "example.com/a.jpg"),
    _link("path", REFUSED, "a path", "/etc/passwd"),
    # Private addresses, in every way to write them.
    _link("loopback", REFUSED, "127.0.0.1", "http://127.0.0.1/a.jpg"),
    _link("localhost", REFUSED, "a name of loopback", "http://localhost/a.jpg"),
    _link("localhost-shouted", REFUSED, "the same in upper case", "http://LOCALHOST/a.jpg"),
    _link("decimal", REFUSED, "127.0.0.1 as one number", "http://2130706433/a.jpg"),
    _link("octal", REFUSED, "127.0.0.1 in octal", "http://0177.0.0.1/a.jpg"),
    _link("hexadecimal", REFUSED, "127.0.0.1 in hexadecimal", "http://0x7f.0.0.1/a.jpg"),
    _link("short", REFUSED, "127.1", "http://127.1/a.jpg"),
    _link("zero", REFUSED, "0.0.0.0", "http://0.0.0.0/a.jpg"),
    _link("rfc1918", REFUSED, "10.0.0.1", "http://10.0.0.1/a.jpg"),
    _link("metadata", REFUSED, "a cloud's metadata", "http://169.254.169.254/latest/meta-data/"),
    _link("cgnat", REFUSED, "100.64.0.1", "http://100.64.0.1/a.jpg"),
    _link("multicast", REFUSED, "224.0.0.1", "http://224.0.0.1/a.jpg"),
    _link("ipv6", REFUSED, "::1", "http://[::1]/a.jpg"),
    _link("ipv6-mapped", REFUSED, "127.0.0.1 as IPv6", "http://[::ffff:127.0.0.1]/a.jpg"),
    _link("ipv6-local", REFUSED, "fe80::1", "http://[fe80::1]/a.jpg"),
    _link("ipv6-unique", REFUSED, "fd00:ec2::254, metadata", "http://[fd00:ec2::254]/latest/"),
    _link("nat64", REFUSED, "64:ff9b::7f00:1", "http://[64:ff9b::7f00:1]/a.jpg"),
    _link(
        "userinfo", REFUSED, "a host that looks like another", "http://example.com@127.0.0.1/a.jpg"
    ),
    # Malformed.
    _link("no-host", REFUSED, "no host", "http:///a.jpg"),
    _link("port", REFUSED, "port 99999", "http://example.com:99999/a.jpg"),
    _link("bracket", REFUSED, "half of an IPv6 address", "http://[::1/a.jpg"),
    _link("empty", REFUSED, "no link", ""),
    # What servers do.
    _link("good", SAMPLE, "a picture", f"{SERVER}/good.jpg"),
    _link("to-file", REFUSED, "a redirect to file:", f"{SERVER}/redirect?to=file:///etc/passwd"),
    _link("to-loop", FAILED, "a redirect to itself", f"{SERVER}/loop"),
    _link("newline", FAILED, "a newline that would begin a header", f"{SERVER}/a.jpg\r\nX-Evil: 1"),
    _link("missing", FAILED, "404", f"{SERVER}/missing.jpg"),
    _link("html", "undecodable", "an error page with status 200", f"{SERVER}/html.jpg"),
    _link("nothing", FAILED, "no bytes with status 200", f"{SERVER}/nothing.jpg"),
    _link("endless", "too-large", "a body without end", f"{SERVER}/endless.jpg"),
    _link("short-body", FAILED, "fewer bytes than announced", f"{SERVER}/short.jpg"),
    _link("drip", FAILED, "a byte every half second", f"{SERVER}/drip.jpg"),
    _link(
        "bomb",
        "too-large",
        "gzip as content encoding, 64 MB of zeros in 64 KB",
        f"{SERVER}/bomb.jpg",
    ),
    _link("no-ai", "opted-out", "X-Robots-Tag: noai", f"{SERVER}/noai.jpg"),
]

"""One canonical form of links, so that a takedown finds a picture however its address is spelt.

RFC 3986, §6.2: case of scheme and host, default port, percent-encoding, dot segments, an empty
path. Beyond it what looks alike and leads to the same place: a fragment is never sent, a host is
international or in its xn-- form, letters are composed or not, and what stands around a link (a
byte order mark, no-break and zero-width spaces) is no part of it.
"""

from __future__ import annotations

import ipaddress
import re
import string
import unicodedata
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes

from yarl import URL

if TYPE_CHECKING:
    import pyarrow as pa

PORTS = {"http": 80, "https": 443, "ftp": 21}  # schemes whose links have a form

# Links that are canonical as they stand, for RE2: most of a list. What it misses costs time only.
_SEGMENT = r"/[A-Za-z0-9_~!$&'()*+,;=:@-][A-Za-z0-9._~!$&'()*+,;=:@-]*"
_PLAIN = (
    r"^https?://[a-z0-9_-]+(\.[a-z0-9_-]+)*"
    rf"(/|({_SEGMENT})+/?)(\?[A-Za-z0-9._~!$&'()*+,;=:@/?-]+)?$"
)
_PARTS = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(?:#.*)?", re.DOTALL
)
_UNRESERVED = string.ascii_letters + string.digits + "-._~"
_PATH = frozenset(_UNRESERVED + "!$&'()*+,;=:@/")
_QUERY = frozenset(_UNRESERVED + "!$&'()*+,;=:@/?")
_ESCAPES = re.compile(r"((?:%[0-9A-Fa-f]{2})+)")
_BREAKS = re.compile(r"[\t\r\n]")  # browsers leave them out of a link
_KEPT = 0xD800  # surrogates, which no text holds, stand for bytes that stay encoded


def stripped(text: str) -> str:
    """Without what cannot be seen at its ends: spaces of all kinds, marks, controls."""
    begin, end = 0, len(text)
    while begin < end and _unseen(text[begin]):
        begin += 1
    while begin < end and _unseen(text[end - 1]):
        end -= 1
    return text[begin:end]


def canonical(link: str) -> str:
    """The one form of a link; of what is none (a file's name) its text without spaces around it.

    Links of one form lead to the same picture. It is for comparing: nothing is fetched by it.
    """
    link = stripped(link)
    found = _PARTS.fullmatch(_BREAKS.sub("", link))
    scheme = found[1].lower() if found else ""
    if found is None or scheme not in PORTS:
        return unicodedata.normalize("NFC", link)
    path = _encoded(found[3], _PATH, differ="/")
    path = _without_dots(path) if "/." in path else path or "/"
    # "&", "=", "+" and ";" part a query's values; encoded, they are within one.
    query = _encoded(found[4] or "", _QUERY, differ="&=+;")
    return f"{scheme}://{_authority(scheme, found[2])}{path}" + (f"?{query}" if query else "")


def canonical_key(key: str) -> str:
    """The one form of a sample's key."""
    return unicodedata.normalize("NFC", stripped(key))


def canonical_links(links: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """`canonical` of a column. Those that are canonical as they stand cost no Python."""
    import pyarrow.compute as pc

    return _mended(links, pc.match_substring_regex(links, _PLAIN), canonical)  # pyright: ignore


def canonical_keys(keys: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """`canonical_key` of a column."""
    import pyarrow.compute as pc

    return _mended(keys, pc.match_substring_regex(keys, r"^[!-~]*$"), canonical_key)  # pyright: ignore


def _mended(column, plain, form) -> pa.ChunkedArray | pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    others = pc.invert(pc.fill_null(plain, True))  # pyright: ignore
    texts = column.filter(others).to_pylist()
    if not texts:
        return column
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    mask = others.combine_chunks() if isinstance(others, pa.ChunkedArray) else others
    forms = pa.array([form(text) for text in texts], whole.type)
    return pc.replace_with_mask(whole, mask, forms)  # pyright: ignore


def _unseen(character: str) -> bool:
    return unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cc", "Cf")


def _authority(scheme: str, text: str) -> str:
    """[user@]host[:port]."""
    user, at, place = text.rpartition("@")
    host, port = re.fullmatch(r"(.*?)(?::(\d*))?", place, re.DOTALL).groups()  # pyright: ignore
    shown = f":{int(port)}" if port and int(port) != PORTS[scheme] else ""
    return f"{user}{at}{_host(unquote(host))}{shown}"


def _host(name: str) -> str:
    name = name.rstrip(".")  # the root of all names, which the resolver adds
    try:
        if name.startswith("["):
            return f"[{ipaddress.ip_address(name[1:-1])}]"
        return (URL(f"http://{name}/").raw_host or name).lower().rstrip(".")
    except (ValueError, IndexError):  # no name; whatever it is, it has one spelling
        return name.lower()


def _encoded(text: str, plain: frozenset[str], differ: str) -> str:
    """Encoded where it must be and nowhere else; characters of `differ` stay as they are."""
    if text.isascii() and "%" not in text:
        return "".join(c if c in plain else f"%{ord(c):02X}" for c in text)
    parts = _ESCAPES.split(text)
    parts[1::2] = [_decoded(unquote_to_bytes(part), differ) for part in parts[1::2]]
    found = []
    for character in unicodedata.normalize("NFC", "".join(parts)):
        if character in plain:
            found.append(character)
        elif _KEPT <= ord(character) < _KEPT + 128:
            found.append(f"%{ord(character) - _KEPT:02X}")
        else:
            data = character.encode("utf-8", "surrogateescape")
            found += [f"%{byte:02X}" for byte in data]
    return "".join(found)


def _decoded(data: bytes, differ: str) -> str:
    text = data.decode("utf-8", "surrogateescape")
    return "".join(chr(_KEPT + ord(c)) if c in differ else c for c in text)


def _without_dots(path: str) -> str:
    """RFC 3986, §5.2.4."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)

"""Links in names and messages: without what may be secret in them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def public(url: str) -> str:
    """A URL without what may be secret: user, query and fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def harmless(text: str) -> str:
    """A client's message in one line, without the queries and users of the URLs in it."""
    line = " ".join(text.split())
    return re.sub(r"\?[^\s'\")>]*", "?…", re.sub(r"//[^/\s@]*@", "//", line))[:300]


def last_part(url: str) -> str:
    """A readable name of what a link leads to."""
    return urlsplit(url).path.rstrip("/").rpartition("/")[2] or "file"

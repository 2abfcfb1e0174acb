"""What a site asks of crawlers: robots.txt (RFC 9309) and the X-Robots-Tag header.

The standard library's parser knows no wildcards and takes the first rule that matches, where the
RFC takes the longest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

MAX_BYTES = 500 * 1024  # of robots.txt that are read, as the RFC asks at least


@dataclass(frozen=True)
class Rules:
    """The rules that concern one crawler: (allowed, pattern)."""

    rules: tuple[tuple[bool, str], ...] = ()

    def allow(self, path: str) -> bool:
        """Whether a path with its query may be asked for: the longest pattern decides, of equal
        ones that which allows."""
        path = _normal(path)
        matching = [(len(p), allowed) for allowed, p in self.rules if _matches(p, path)]
        return max(matching, default=(0, True))[1]


EVERYTHING = Rules()


def parse(text: str, token: str) -> Rules:
    """The rules for the crawler of that product token: its own groups, else those for all."""
    own: list[tuple[bool, str]] | None = None
    others: list[tuple[bool, str]] = []
    targets: list[list[tuple[bool, str]]] = []
    naming = False  # in the user-agent lines that begin a group
    for line in text.splitlines():
        name, colon, value = line.partition("#")[0].partition(":")
        name, value = name.strip().lower(), value.strip()
        if not colon:
            continue
        if name in ("user-agent", "useragent"):
            if not naming:
                targets = []
            naming = True
            agent = re.split(r"[/\s]", value, maxsplit=1)[0].lower()
            if agent == token.lower():
                own = [] if own is None else own
                targets.append(own)
            elif agent == "*":
                targets.append(others)
        elif name in ("allow", "disallow"):
            naming = False
            if value:  # an empty one says nothing
                for target in targets:
                    target.append((name == "allow", _normal(value)))
    return Rules(tuple(others if own is None else own))


def opt_out(values: Iterable[str], tokens: Iterable[str], directives: Iterable[str]) -> str | None:
    """The directive of X-Robots-Tag headers that forbids the use of a picture, or None.

    Args:
        values: of the headers: "noai, noimageai" concerns all, "somebot: noindex" one crawler.
        tokens: the names that this crawler hears to.
        directives: those that forbid.
    """
    listening = {token.lower() for token in tokens}
    forbidding = {directive.lower() for directive in directives}
    if "noindex" in forbidding:
        forbidding.add("none")  # short for noindex, nofollow
    for value in values:
        concerned = True
        for part in value.split(","):
            directive = part.strip().lower()
            agent, colon, rest = directive.partition(":")
            if colon and _AGENT.fullmatch(agent.strip()) and agent.strip() not in _WITH_VALUE:
                concerned = agent.strip() in (*listening, "*")
                directive = rest.strip()
            if concerned and directive in forbidding:
                return directive
    return None


_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_AGENT = re.compile(r"[a-z*][a-z0-9_.*-]*")  # not what is left of a date
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")


def _normal(path: str) -> str:
    """One spelling of percent-encoding."""

    def one(match: re.Match[str]) -> str:
        char = chr(int(match[1], 16))
        return char if _UNRESERVED.fullmatch(char) else match[0].upper()

    quoted = quote(path, safe="".join(map(chr, range(33, 127))))
    return re.sub(r"%([0-9a-fA-F]{2})", one, quoted)


def _matches(pattern: str, path: str) -> bool:
    """ "*" is any text, "$" at the end the end; linear, whatever a stranger writes."""
    ends = pattern.endswith("$")
    first, *rest = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    at = len(first)
    if not rest:
        return not ends or at == len(path)
    if ends:
        last = rest.pop()
        if len(path) - at < len(last) or not path.endswith(last):
            return False
        path = path[: len(path) - len(last)]
    for piece in rest:
        at = path.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources.web.robots import EVERYTHING, Rules, opt_out, parse


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        # RFC 9309, section 2.2.3
        ("/foo/bar?baz=quz", "/foo/bar?baz=quz", True),
        ("/foo/bar?baz=http://foo.bar", "/foo/bar?baz=http://foo.bar", True),
        ("/foo/bar/ツ", "/foo/bar/%E3%83%84", True),
        ("/foo/bar/%E3%83%84", "/foo/bar/ツ", True),
        ("/foo/bar/%62%61%7A", "/foo/bar/baz", True),
        ("/foo/bar/%2f", "/foo/bar//", False),
        ("/foo/bar/%2f", "/foo/bar/%2F", True),
        # wildcards
        ("/", "/anything", True),
        ("/fish", "/fish.html", True),
        ("/fish", "/Fish.asp", False),
        ("/fish/", "/fish", False),
        ("/*.php", "/folder/a.php?x", True),
        ("/*.php$", "/a.php", True),
        ("/*.php$", "/a.php?x", False),
        ("/fish*.php", "/fishheads/catfish.php", True),
        ("/a*b*c$", "/abcbc", True),
        ("/a*b*c$", "/abcb", False),
        ("/a*a$", "/a", False),
        ("*", "/x", True),
        ("$", "/x", False),
        ("/x$", "/x", True),
    ],
)
def test_patterns(pattern, path, matches):
    assert parse(f"User-agent: *\nDisallow: {pattern}", "bot").allow(path) is not matches


@given(st.text("ab*$", max_size=8), st.text("ab", max_size=12))
def test_patterns_match_as_regular_expressions_would(pattern, path):
    body = pattern.removesuffix("$")
    regex = ".*".join(map(re.escape, body.split("*"))) + ("$" if pattern.endswith("$") else "")
    expected = re.match(regex, path) is not None
    assert Rules(((False, pattern),)).allow(path) is not expected


def test_the_longest_pattern_decides_and_of_equal_ones_that_which_allows():
    rules = parse(
        "User-agent: *\nDisallow: /a\nAllow: /a/b\nDisallow: /a/b/c\nAllow: /x\nDisallow: /x", "bot"
    )
    paths = {"/a/z": False, "/a/b": True, "/a/b/c": False, "/x": True, "/other": True}
    assert {path: rules.allow(path) for path in paths} == paths


def test_groups():
    text = """
    Disallow: /early
    User-agent: one
    User-agent: Two/1.0
    Disallow: /a
    Crawl-delay: 5
    Sitemap: http://h/sitemap.xml
    User-agent: *
    Disallow: /b

    User-agent: two
    Disallow: /c
    User-agent: three
    """
    disallowed = {
        token: [p for p in ("/a", "/b", "/c", "/early") if not parse(text, token).allow(p)]
        for token in ("one", "two", "three", "four")
    }
    assert disallowed == {"one": ["/a"], "two": ["/a", "/c"], "three": [], "four": ["/b"]}
    assert parse("", "bot") == EVERYTHING
    assert parse("\x00<html>not found</html>", "bot").allow("/")


def test_a_hostile_pattern_takes_no_time():
    pattern = "/" + "a*" * 50_000 + "b$"
    started = time.perf_counter()
    assert parse(f"User-agent: *\nDisallow: {pattern}", "bot").allow("/" + "a" * 2000 + "c")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["noai"], "noai"),
        (["NOAI, noarchive"], "noai"),
        (["max-image-preview: large, noindex"], "noindex"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Fri, 25 Jun 2010 15:00:00 PST, noai"], "noai"),
        (["otherbot: noai", "noindex"], "noindex"),
        (["otherbot: nofollow, noai"], None),
        (["otherbot: noai, mybot: noindex"], "noindex"),
        (["*: noai"], "noai"),
        (["MyBot: none"], "none"),
        (["img2dataset: noai"], "noai"),
        (["index, follow", "noaiml", ""], None),
        ([], None),
    ],
)
def test_headers(values, found):
    directives = ("noai", "noimageai", "noindex", "noimageindex")
    assert opt_out(values, ("mybot", "img2dataset"), directives) == found
    assert opt_out(values, ("mybot",), ()) is None

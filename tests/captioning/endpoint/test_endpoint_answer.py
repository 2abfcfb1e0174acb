from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.endpoint.answer import Said, Unreadable, error_text, read
from tests.captioning.helpers.openai_server import completion, last_chunk, stream

USAGE = {"choices": [], "usage": {"completion_tokens": 5}}  # a chunk of its own, where asked for


def as_json(record: object) -> bytes:
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (as_json(completion("a fox")), Said("a fox", 7, "stop")),
        (as_json(completion("a f", "length", None)), Said("a f", None, "length")),
        (as_json(completion(None)), Said("", 7, "stop")),
        (as_json(completion([{"type": "text", "text": "a"}, {"text": " fox"}])),
         Said("a fox", 7, "stop")),
        (as_json(completion("a \ud83d\ude00")), Said("a 😀", 7, "stop")),
        (as_json(completion("half \ud83d")), Said("half �", 7, "stop")),
        (stream("a ", "fox", last_chunk()), Said("a fox", None, "stop")),
        (stream("a ", "fox", last_chunk("length"), USAGE), Said("a fox", 5, "length")),
        (stream("a fox", last_chunk(), done=False), Said("a fox", None, "stop")),
        (stream("a fox"), Said("a fox", None, None)),
        (b": ping\r\n\r\n" + stream("a fox", last_chunk()).replace(b"\n", b"\r\n"),
         Said("a fox", None, "stop")),
        (b"event: x\nid: 1\n" + stream("a fox", last_chunk()), Said("a fox", None, "stop")),
        (stream("smile \ud83d", "\ude00", last_chunk()), Said("smile 😀", None, "stop")),
    ],
)  # fmt: skip
def test_both_forms_of_an_answer_are_read(body, said):
    assert read(body) == said


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "no JSON"),
        (b"<html><body>Welcome to nginx!</body></html>", "HTML"),
        (b"  <!DOCTYPE html>", "HTML"),
        (b'{"choices": [', "no JSON"),
        (b"[]", "no object"),
        (b"\xff\xfe", "no UTF-8"),
        (b"[" * 100_000, "no JSON"),
        (as_json({"choices": []}), "no choices"),
        (as_json({"choices": None}), "no choices"),
        (as_json({"choices": ["a fox"]}), "no choices"),
        (as_json({"choices": [{"text": "a fox"}]}), "without a message"),
        (as_json({"error": {"message": "engine died"}}), "an error: engine died"),
        (stream("a fox", done=False), "breaks off"),
        (stream("a fox", last_chunk())[:40], "no JSON"),
        (stream(USAGE), "no choices"),
        (b'data: {"error": "CUDA out of memory"}', "an error: CUDA out of memory"),
        # transformers' server puts any exception's text between quotes.
        (b'data: {"error": "no "model" here"}', "an error"),
    ],
)
def test_what_is_no_whole_answer_is_told_by_what_it_is(body, what):
    with pytest.raises(Unreadable, match=what):
        read(body)


@settings(deadline=None)
@given(st.binary() | st.text().map(str.encode) | st.text().map(lambda t: f"data: {t}\n".encode()))
def test_no_bytes_do_anything_else(body):
    with contextlib.suppress(Unreadable):
        read(body).text.encode()


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_every_text_arrives_as_it_is(text):
    assert read(as_json(completion(text))).text == text
    assert read(stream(*text, last_chunk())).text == text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (as_json({"error": {"message": "max_tokens\nis  too large", "code": 400}}),
         "max_tokens is too large"),
        (as_json({"object": "error", "message": "no such model"}), "no such model"),
        (as_json({"detail": [{"loc": ["body"], "msg": "field required"}]}), "field required"),
        (b"<html>502 Bad Gateway</html>", "an HTML page"),
        (b"upstream connect error", "upstream connect error"),
        (b"[" * 100_000, "[[["),
        (b'{"error": {"message": "half \\ud83d\\u001b[31m of it"}}', "half [31m of it"),
        (b'{"detail": "\xff"}', "\ufffd"),
    ],
)  # fmt: skip
def test_an_error_becomes_one_line_that_can_be_printed_and_stored(body, text):
    line = error_text(body)
    assert text in line
    assert "\n" not in line
    line.encode()


def test_whatever_else_an_answer_says_can_be_stored():
    record: Any = completion("a fox", "sto\ud83dp", True)
    record["choices"][0]["message"]["refusal"] = "no \ud83d\x1b"
    assert read(as_json(record)) == Said("a fox", None, "sto p", "no")

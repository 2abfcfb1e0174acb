"""What a server that speaks OpenAI's API answers: one JSON object, or a stream of events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from captioning.clean import one_line


@dataclass(frozen=True)
class Said:
    """The first choice of a chat completion."""

    text: str
    tokens: int | None  # None: the server does not count
    finish_reason: str | None  # as the server gives it
    refusal: str | None = None  # instead of a text: why there is none


class Unreadable(ValueError):
    """An answer that is no chat completion, or not all of one. The message says what it is, and
    may be as long as the answer: a key has to be taken out before anything is cut."""


def read(body: bytes) -> Said:
    """A chat completion, in whichever of its two forms the server sends: some stream always.

    Raises:
        Unreadable: it is neither, it breaks off, or it has no choice.
    """
    start = body.lstrip()[:8].lower()
    if start.startswith(b"<"):
        raise Unreadable("HTML or XML, no JSON")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable("no UTF-8") from error
    if start.startswith((b"data:", b":", b"event:", b"id:", b"retry:")):
        return _read_stream(text)
    answer = _object(text)
    choice = _first_choice(answer)
    if choice is None:
        raise Unreadable("no choices")
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Unreadable("a choice without a message")
    refusal = message.get("refusal")
    content, reason = _content(message.get("content")), choice.get("finish_reason")
    return Said(_sound(content), _tokens(answer), _line(reason), _line(refusal))


def error_text(body: bytes) -> str:
    """What the body of an answer with an error status says, on one line that may be long.

    OpenAI and vLLM nest it ({"error": {"message"}}), SGLang and older vLLM do not ({"message"}),
    FastAPI calls it "detail".
    """
    text = body.decode("utf-8", "replace")
    try:
        found: Any = json.loads(text)
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(name):
                found = found[name]
        found = found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        found = "an HTML page" if text.lstrip().startswith("<") else text
    return one_line(found)


def _read_stream(text: str) -> Said:
    """Server-sent events. Whole if it ends in [DONE] or a finish reason: transformers' server
    sends no [DONE]."""
    parts: list[str] = []
    refusals: list[str] = []
    tokens = reason = None
    chosen = done = False
    for data in _events(text):
        if data == "[DONE]":
            done = True
            break
        chunk = _object(data)
        counted = _tokens(chunk)
        tokens = tokens if counted is None else counted
        choice = _first_choice(chunk)
        if choice is None:  # usage comes in a chunk of its own
            continue
        chosen = True
        delta = choice.get("delta")
        if isinstance(delta, dict):
            parts.append(_content(delta.get("content")))
            refusals.append(_string(delta.get("refusal")) or "")
        reason = _line(choice.get("finish_reason")) or reason
    if not (done or reason):
        raise Unreadable("a stream that breaks off")
    if not chosen:
        raise Unreadable("no choices")
    return Said(_sound("".join(parts)), tokens, reason, _line("".join(refusals)) or None)


def _events(text: str) -> Iterator[str]:
    """The data of each event; comments, which keep the connection open, have none."""
    data: list[str] = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
    if data:  # an event that is not closed: transformers' server reports errors so
        yield "\n".join(data)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith('{"error"'):
            raise Unreadable(f"an error: {error_text(text.encode())}") from error
        raise Unreadable(f"no JSON: {one_line(text)}") from error
    if not isinstance(found, dict):
        raise Unreadable(f"JSON, but no object: {type(found).__name__}")
    if found.get("error"):
        raise Unreadable(f"an error: {error_text(text.encode())}")
    return found


def _first_choice(answer: dict[str, Any]) -> dict[str, Any] | None:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    return choices[0]


def _content(content: Any) -> str:
    """A text, or a list of parts of which some are text; None where there is none."""
    if isinstance(content, list):
        said = (p for p in content if isinstance(p, dict) and p.get("type") not in _THOUGHTS)
        return "".join(_content(part.get("text")) for part in said)
    return _string(content) or ""


_THOUGHTS = ("thinking", "reasoning")  # types of parts that are no answer


def _sound(text: str) -> str:
    """Without halves of characters: JSON can write them, and a stream may cut between two."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _tokens(answer: dict[str, Any]) -> int | None:
    usage = answer.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count < 2**31 else None


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _line(value: Any) -> str | None:
    return one_line(value) if isinstance(value, str) else None

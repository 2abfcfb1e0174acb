from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from aiohttp import web
from PIL import Image

from captioning import BadPicture, BadSetting, Caption, Failure, Picture, load
from captioning.endpoint.settings import KEY_VARIABLE, completions_url
from tests.captioning.helpers.openai_server import (
    Request,
    Server,
    caption_of,
    completion,
    error,
    last_chunk,
    stream,
)

KEY = "sk-very-secret-0123456789"


def file(number: int) -> bytes:
    """A JPEG unlike those of other numbers."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (number % 256, number // 256, 90)).save(buffer, "JPEG")
    return buffer.getvalue() + b"\0" * (number % 7)


def opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except OSError as found:
        raise BadPicture("undecodable", str(found)) from found


def picture(key: str, data: bytes) -> Picture:
    return Picture(key, lambda: opened(data), data)


def pictures(count: int) -> list[Picture]:
    return [picture(f"{number:09d}", file(number)) for number in range(count)]


def endpoint(url: str, **settings):
    given = {"model": "tiny", "concurrency": 8, "backoff_s": 0.02, "timeout_s": 5.0, **settings}
    return load("endpoint", url=url, **given)


def answers(captioner, given: Iterable[Picture]) -> dict[str, list[Caption] | Failure]:
    """Each key's answer; no key twice."""
    found = list(captioner.caption(given))
    assert len(dict(found)) == len(found)
    return dict(found)


def captions(captioner, given: Iterable[Picture]) -> dict[str, list[Caption]]:
    """The same where no picture fails."""
    found = answers(captioner, given)
    return {key: answer for key, answer in found.items() if not isinstance(answer, Failure)}


def check(found: Mapping[str, list[Caption] | Failure], given: list[Picture]) -> None:
    """Every picture has its own caption."""
    assert sorted(found) == [one.key for one in given]
    for one in given:
        answer = found[one.key]
        assert isinstance(answer, list), answer
        assert [caption.text for caption in answer] == [caption_of(one.data or b"")]


def test_each_picture_gets_its_own_caption_and_what_is_known_of_it():
    given = pictures(40)
    with Server() as server:
        found = captions(endpoint(server.url), given)
    check(found, given)
    (caption,) = found["000000003"]
    assert caption.captioner == "endpoint"
    assert caption.revision == "tiny"
    assert (caption.tokens, caption.finish_reason) == (7, "stop")
    assert caption.best_effort
    assert "Describe this picture" in caption.prompt


def test_the_server_is_asked_as_openai_says():
    with Server() as server:
        answers(endpoint(server.url, prompt="What is this?", max_tokens=33), pictures(1))
        (request,) = server.seen
    assert request.media_type == "image/jpeg"
    assert request.picture == file(0)
    content = request.body["messages"][0]["content"]
    assert content[1] == {"type": "text", "text": "What is this?"}
    del request.body["messages"]
    assert request.body == {"model": "tiny", "max_tokens": 33, "temperature": 0.0, "stream": False}
    assert "Authorization" not in request.headers


def test_at_a_temperature_each_caption_has_its_own_seed():
    def seeds(seed: int, keys: list[str]) -> dict[str, list[int]]:
        with Server() as server:
            made = endpoint(server.url, temperature=0.5, num_captions=3, seed=seed)
            found = captions(made, [picture(key, file(int(key))) for key in keys])
            drawn: dict[str, list[int]] = {}
            for request in server.seen:
                drawn.setdefault(request.caption, []).append(request.body["seed"])
        assert all([c.number for c in found[key]] == [0, 1, 2] for key in keys)
        return drawn

    first = seeds(0, ["1", "2"])
    assert len({seed for drawn in first.values() for seed in drawn}) == 6
    assert all(0 <= seed < 2**31 for drawn in first.values() for seed in drawn)
    assert seeds(0, ["2", "1"]) == first
    assert seeds(1, ["1", "2"]) != first


def test_several_prompts_take_turns():
    with Server() as server:
        captioner = endpoint(server.url, prompt="short,long")
        (found,) = answers(captioner, pictures(1)).values()
    assert isinstance(found, list)
    assert [caption.prompt for caption in found] == [p.text for p in captioner.settings.prompts]


def test_pillow_pictures_go_too():
    with Server() as server:
        made = endpoint(server.url)([Image.new("RGB", (9, 9), c) for c in ("red", "blue")])
        assert {request.media_type for request in server.seen} == {"image/jpeg"}
        assert {caption.text for caption in made} == {request.caption for request in server.seen}


def test_a_running_event_loop_is_no_hindrance():
    """As in a notebook."""

    async def cell() -> list[Caption]:
        return endpoint(server.url)([Image.new("RGB", (9, 9))])

    with Server() as server:
        assert len(asyncio.run(cell())) == 1


def test_streamed_answers_are_read():
    def behave(request: Request) -> web.Response:
        body = stream(*request.caption, last_chunk(), done=False)
        return web.Response(body=body, content_type="text/event-stream")

    given = pictures(5)
    with Server(behave) as server:
        found = captions(endpoint(server.url), given)
    check(found, given)
    assert {c.tokens for answer in found.values() for c in answer} == {None}


def test_tokens_are_counted_where_only_the_tokenizer_is_known(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "picture": 1}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    behave = lambda request: web.json_response(completion("one picture of it", "stop", None))  # noqa: E731
    with Server(behave) as server:
        captioner = endpoint(server.url, tokenizer=str(tmp_path))
        ((caption,),) = captions(captioner, pictures(1)).values()
    assert caption.tokens == 4


FAULTS = {
    "500": lambda: error(500, "internal error"),
    "502 in HTML": lambda: web.Response(
        status=502, text="<html>502 Bad Gateway</html>", content_type="text/html"
    ),
    "503": lambda: error(503, "overloaded"),
    "429": lambda: error(429, "slow down"),
    "408": lambda: error(408, "too slow"),
    "cut": lambda: "cut",
    "HTML": lambda: web.Response(text="<html>moment please</html>", content_type="text/html"),
    "malformed": lambda: web.Response(text='{"choices": [{"mess', content_type="application/json"),
    "no choices": lambda: web.json_response({"id": "1", "choices": []}),
    "an error with status 200": lambda: web.json_response({"error": {"message": "engine died"}}),
    "a stream that breaks off": lambda: web.Response(
        body=stream("a fo", done=False), content_type="text/event-stream"
    ),
    "404 of a proxy": lambda: error(404, "default backend"),
    "silence": lambda: asyncio.sleep(9),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_costs_no_picture(name):
    """Every second request fails, once the first was answered."""

    def behave(request: Request):
        return FAULTS[name]() if request.number % 2 else None

    given = pictures(12)
    with Server(behave) as server:
        captioner = endpoint(server.url, timeout_s=0.3, retries=30, concurrency=4)
        # The first alone: what a server that has never answered does may be a wrong setting.
        found = answers(captioner, given[:1]) | answers(captioner, given[1:])
        assert server.most <= 4
    check(found, given)
    assert captioner.counters["requests"] > 12
    assert sum(n for name, n in captioner.counters.items() if "failed" in name) > 0


def test_all_faults_at_once_lose_nothing_and_caption_nothing_twice():
    kinds = [kind for name, kind in FAULTS.items() if name != "silence"]
    given = pictures(200)

    def behave(request: Request):
        if request.number % 3:
            return None
        return kinds[request.number // 3 % len(kinds)]()

    with Server(behave) as server:
        found = answers(endpoint(server.url, retries=100, backoff_s=0.001), given)
        assert server.most <= 8
    check(found, given)


def test_retry_after_is_waited_for_by_everybody():
    arrived: list[float] = []

    def behave(request: Request):
        arrived.append(time.monotonic())
        return error(429, "slow down", **{"Retry-After": "1"}) if request.number == 5 else None

    given = pictures(40)
    with Server(behave) as server:
        captioner = endpoint(server.url, concurrency=4)
        check(answers(captioner, given), given)
    told = arrived[5]
    # Those that were under way when it was said still arrived; then nobody asked for a second.
    assert len([moment for moment in arrived if told < moment < told + 1]) <= 3
    assert max(arrived) > told + 1
    assert captioner.counters["requests that failed: too many requests"] == 1


def test_retry_after_may_be_a_date():
    from captioning.endpoint.client import _wait

    later = datetime.now(UTC) + timedelta(seconds=30)
    assert 28 <= _wait(format_datetime(later, usegmt=True)) <= 30
    assert _wait("7.5") == 7.5
    for nothing in (None, "", "soon", "-3", "nan", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert _wait(nothing) == 0


def test_a_server_that_loads_its_model_with_the_first_request_gets_one():
    async def behave(request: Request):
        if request.number == 0:
            await asyncio.sleep(0.3)
            loaded.append(len(server.seen))
        await asyncio.sleep(0.02)

    loaded: list[int] = []
    given = pictures(20)
    with Server(behave) as server:
        check(answers(endpoint(server.url), given), given)
        assert loaded == [1]
        assert server.most > 1  # afterwards


def test_to_be_told_to_slow_down_is_no_failure_while_others_get_through():
    """Far more often than `retries`."""
    given = pictures(10)

    def behave(request: Request):
        return error(429, "slow down") if request.number % 4 else None

    with Server(behave) as server:
        captioner = endpoint(server.url, retries=1, backoff_s=0.0005)
        check(answers(captioner, given), given)


def test_a_date_that_no_calendar_has_is_not_waited_for():
    dates = iter(
        [f"Mon, 01 Jan 2024 00:00:00 +{'9' * 20}", f"Mon, {'9' * 20} Jan 2024 00:00:00 GMT"]
    )

    def behave(request: Request):
        date = next(dates, None)
        return None if date is None else error(503, "busy", **{"Retry-After": date})

    given = pictures(1)
    with Server(behave) as server:
        check(answers(endpoint(server.url), given), given)


def test_a_wait_of_hours_ends_the_run():
    def behave(request: Request):
        return error(429, "daily quota", **{"Retry-After": "7200"})

    with Server(behave) as server, pytest.raises(BadSetting, match="asks to wait 7200 s"):
        answers(endpoint(server.url), pictures(3))


@contextlib.contextmanager
def process(port: int, delay_s: float) -> Iterator[subprocess.Popen]:
    """The server in a process of its own, which has begun to listen."""
    command = [
        sys.executable,
        "-m",
        "tests.captioning.helpers.openai_server",
        str(port),
        str(delay_s),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith("http")
        yield running
        running.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_server_that_is_killed_and_restarted_in_the_middle_costs_no_picture():
    given = pictures(60)
    port = free_port()
    captioner = endpoint(f"http://127.0.0.1:{port}", retries=200, backoff_s=0.05)
    found: dict[str, list[Caption] | Failure] = {}
    with process(port, 0.05) as first:
        stream = captioner.caption(given)
        for key, answer in stream:
            assert key not in found
            found[key] = answer
            if len(found) == 10:
                os.kill(first.pid, signal.SIGKILL)
                first.wait()
                break
    with process(port, 0.0):
        for key, answer in stream:
            assert key not in found
            found[key] = answer
    check(found, given)
    assert captioner.counters["requests that failed: unreachable"] > 0


def test_pictures_are_taken_a_bounded_number_ahead():
    taken, most = 0, 0
    given = 0

    def source() -> Iterator[Picture]:
        nonlocal taken, most
        for one in pictures(100):
            taken += 1
            most = max(most, taken - given)
            yield one

    with Server() as server:
        for _ in endpoint(server.url, concurrency=4).caption(source()):
            given += 1
        assert server.most <= 4
    assert given == 100
    assert most <= 4 + 8 + 1


def test_whoever_stops_early_leaves_no_thread_and_no_request_behind():
    before = threading.active_count()

    async def behave(request: Request):
        if request.number:
            await asyncio.sleep(30)

    with Server(behave) as server:
        before += 1
        started = time.monotonic()
        stream = endpoint(server.url, timeout_s=60).caption(pictures(20))
        assert isinstance(stream, Generator)
        next(stream)
        stream.close()
        assert time.monotonic() - started < 5
        assert threading.active_count() <= before


BAD_FILES = {
    "no picture": b"this is text",
    "nothing": b"",
    "cut off": file(1)[:200],
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_picture_fails_alone_and_the_server_never_sees_it(name):
    given = pictures(5)
    with Server() as server:
        found = answers(endpoint(server.url), [*given, picture("bad", BAD_FILES[name])])
        assert BAD_FILES[name] not in [request.picture for request in server.seen]
    bad = found.pop("bad")
    assert isinstance(bad, Failure)
    assert bad.reason == "undecodable"
    check(found, given)


def test_a_picture_that_the_server_refuses_fails_alone():
    """Even the first, when nothing shows yet that it is not the settings."""
    given = pictures(6)

    def behave(request: Request):
        return error(400, "image is too small") if request.picture == given[0].data else None

    with Server(behave) as server:
        found = answers(endpoint(server.url, concurrency=1), given)
    bad = found.pop(given[0].key)
    assert isinstance(bad, Failure)
    assert (bad.reason, bad.detail) == ("refused by the server", "400: image is too small")
    check(found, given[1:])


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_picture_that_the_server_always_fails_on_fails_alone(concurrency):
    given = pictures(6)

    def behave(request: Request):
        return error(500, "assertion failed") if request.picture == given[2].data else None

    with Server(behave) as server:
        captioner = endpoint(server.url, retries=3, concurrency=concurrency)
        found = answers(captioner, given)
    bad = found.pop(given[2].key)
    assert isinstance(bad, Failure)
    assert (bad.reason, bad.detail) == ("server: 500", "500: assertion failed")
    check(found, given[:2] + given[3:])


def test_an_outage_is_no_picture_s_fault():
    """Longer than every request's patience, but not than twice that."""
    given = pictures(30)
    until = 0.0

    def behave(request: Request):
        nonlocal until
        if request.number == 5:
            until = time.monotonic() + 1.3
        return error(503, "starting") if time.monotonic() < until else None

    with Server(behave) as server:
        captioner = endpoint(server.url, retries=6, backoff_s=0.02)
        check(answers(captioner, given), given)


def test_what_the_model_will_not_describe_is_a_failure():
    refused = {"choices": [{"message": {"content": None, "refusal": "I cannot"}}]}
    for body in (refused, completion("", "content_filter")):
        with Server(lambda request, body=body: web.json_response(body)) as server:
            captioner = endpoint(server.url)
            (found,) = answers(captioner, pictures(1)).values()
        assert isinstance(found, Failure)
        assert found.reason == "refused by the model"
        assert captioner.counters["refusals"] == 1
        assert captioner.counters["ms wait"] > 0


REFUSALS = {
    "400": (lambda: error(400, "this model does not see"), "not even an ordinary picture: 400"),
    "401": (lambda: error(401, f"Incorrect API key provided: {KEY}"), "see to the key"),
    "402": (lambda: error(402, "no credit"), "see to the account"),
    "403": (lambda: error(403, "not yours"), "see to the key"),
    "404": (lambda: error(404, "The model `tiny` does not exist."), "model=tiny: give the model"),
    "a redirect": (
        lambda: web.Response(status=301, headers={"Location": "http://127.0.0.1:1/"}),
        "301",
    ),
    "HTML": (
        lambda: web.Response(text="<html>Welcome</html>", content_type="text/html"),
        "the answer is HTML",
    ),
    "no quota": (
        lambda: web.json_response({"error": {"code": "insufficient_quota"}}, status=429),
        "see to the account",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_no_request_will_mend_is_one_clear_line(name, monkeypatch):
    behave, line = REFUSALS[name]
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with Server(lambda request: behave()) as server:
        with pytest.raises(BadSetting, match=re.escape(line)) as found:
            answers(endpoint(server.url), pictures(300))
        assert len(server.seen) < 60
    assert "\n" not in str(found.value)
    assert server.url in str(found.value)
    assert KEY not in str(found.value)


@pytest.mark.parametrize("retries", [0, 10])
def test_no_server_at_all_is_one_clear_line(retries):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(BadSetting, match=f"url={url}.*no ") as found:
        answers(endpoint(url, retries=retries), pictures(3))
    assert "\n" not in str(found.value)


def test_a_server_that_stays_away_ends_the_run_and_blames_no_picture():
    given = pictures(50)
    port = free_port()
    captioner = endpoint(f"http://127.0.0.1:{port}", retries=2)
    with process(port, 0.02):
        stream = captioner.caption(given)
        done = [next(stream) for _ in range(5)]
    with pytest.raises(BadSetting, match=r"no answer, 3 times and more: .*run again"):
        done += list(stream)
    check(dict(done), [one for one in given if one.key in dict(done)])


def test_the_key_goes_into_the_header_and_nowhere_else(monkeypatch, caplog, capfd):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    caplog.set_level(logging.DEBUG)

    def behave(request: Request):
        return error(400, f"{KEY} may not do this") if request.number == 3 else None

    with Server(behave) as server:
        captioner = endpoint(server.url, concurrency=1)
        found = answers(captioner, pictures(6))
        assert {request.headers["Authorization"] for request in server.seen} == {f"Bearer {KEY}"}
        assert all(KEY not in str(request.body) for request in server.seen)
    assert sum(isinstance(answer, Failure) for answer in found.values()) == 1
    told = [found, captioner.decisive(), captioner.settings, captioner.label(), captioner.counters]
    assert KEY not in repr(told)
    assert KEY.encode() not in pickle.dumps(captioner)
    assert KEY not in caplog.text
    assert KEY not in "".join(capfd.readouterr())


def test_no_part_of_the_key_is_left_where_a_message_is_cut(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    begun = KEY[:9]
    refused = {"choices": [{"message": {"refusal": f"{'x' * 190}{KEY}"}}]}

    def behave(request: Request):
        return {
            1: lambda: error(400, f"{'x' * 185}{KEY}"),
            2: lambda: web.json_response(refused),
        }.get(request.number, lambda: None)()

    with Server(behave) as server:
        captioner = endpoint(server.url, concurrency=1, retries=0)
        found = answers(captioner, pictures(3))
    assert sum(isinstance(answer, Failure) for answer in found.values()) == 2
    assert begun not in repr(found)
    for body in (f"{'x' * 50}{KEY}", f"<html>{'x' * 45}{KEY}", f"data: {'x' * 45}{KEY}"):
        with Server(lambda request, body=body: web.Response(text=body)) as server:
            with pytest.raises(BadSetting) as stopped:
                answers(endpoint(server.url, retries=0), pictures(1))
            assert begun not in str(stopped.value)


def test_a_key_of_other_services_is_left_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as server:
        answers(endpoint(server.url), pictures(1))
        assert "Authorization" not in server.seen[0].headers


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_cannot_be_one_is_refused_unseen(key, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(BadSetting, match=KEY_VARIABLE) as found:
        answers(endpoint("http://127.0.0.1:1"), pictures(1))
    assert key not in str(found.value)


@pytest.mark.parametrize("url", ["http://user:{}/v1", "user:{}@host/v1", "http://u:{}@h/v1"])
def test_an_address_that_is_half_written_gives_no_password_away(url):
    with pytest.raises(BadSetting, match=r"^url.*127\.0\.0\.1") as found:
        endpoint(url.format(KEY))
    assert KEY not in str(found.value)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"model": " "}, "model: empty; give the name"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"timeout_s": float("inf")}, "timeout_s=inf"),
        ({"retries": -1}, "retries=-1"),
        ({"backoff_s": 0}, "backoff_s=0"),
        ({"prompt": "USER: <image>\nWhat? ASSISTANT:"}, "has a slot"),
        ({"url": "localhost:8000"}, "no http or https address"),
        ({"url": "ftp://localhost"}, "no http or https address"),
        ({"url": "http://"}, "no http or https address"),
        ({"url": "http://localhost:port"}, "url: no address"),
        ({"url": f"http://me:{KEY}@localhost"}, "MICRODIT_ENDPOINT_KEY"),
        ({"url": f"http://localhost/v1?api-key={KEY}"}, "MICRODIT_ENDPOINT_KEY"),
        ({"bogus": 1}, "bogus: no setting"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(settings, line):
    given = {"model": "tiny", **settings}
    with pytest.raises(BadSetting, match=re.escape(line)) as found:
        load("endpoint", **given)
    assert KEY not in str(found.value)
    assert "\n" not in str(found.value)


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path):
    for name in (str(tmp_path), "nobody/nothing", "a/b/c/d"):
        captioner = endpoint("http://127.0.0.1:1", tokenizer=name)
        with pytest.raises(BadSetting, match="tokenizer="):
            answers(captioner, pictures(1))


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("http://host:8000", "http://host:8000/v1/chat/completions"),
        ("http://host:8000/", "http://host:8000/v1/chat/completions"),
        ("http://host:8000/v1", "http://host:8000/v1/chat/completions"),
        ("https://host/openai/v1/", "https://host/openai/v1/chat/completions"),
        ("http://[::1]:8000/v1/chat/completions", "http://[::1]:8000/v1/chat/completions"),
    ],
)
def test_an_address_may_be_given_as_far_as_one_knows_it(url, whole):
    assert completions_url(url) == whole


def test_what_decides_a_caption_is_the_model_not_the_machine():
    def one(**settings):
        return load("endpoint", **{"model": "tiny", **settings})

    same = [one(), one(url="http://elsewhere/v1", concurrency=1, timeout_s=1.0, retries=0)]
    assert len({(c.label(), c.revision, repr(c.decisive())) for c in same}) == 1
    others = [one(), one(model="m/large"), one(revision="2"), one(prompt="short"), one(seed=1)]
    known = {(c.label(), c.revision, repr(c.decisive())) for c in others}
    assert len(known) == 4  # a seed is nothing to a greedy model
    assert one(model="llava-hf/llava:7b").label() == "endpoint-llava-hf--llava-7b"
    assert one(prompt="short").label() == "endpoint-tiny.short"

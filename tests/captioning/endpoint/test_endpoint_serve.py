"""The real thing: `transformers serve` on loopback with a small random LLaVA."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioning import BadSetting, Caption, Failure, Picture, load
from tests.captioning.helpers.small_llava import save_llava

pytestmark = pytest.mark.slow
TOLD = {"prompt": "short", "max_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llava(tmp_path_factory.mktemp("model") / "small"))


@pytest.fixture
def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serving(port: int, scratch: Path) -> Iterator[subprocess.Popen]:
    """The server, once it says that it is well."""
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-m", "transformers.commands.transformers_cli", "serve", *where]
    # It leaves a file of each picture in the temporary folder.
    own = {"TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1"}
    log = scratch / "server.log"
    with log.open("wb") as file, subprocess.Popen(
        command, env={**os.environ, **own}, stdout=file, stderr=file
    ) as server:  # fmt: skip
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                time.sleep(0.2)
            yield server
        finally:
            server.kill()


def picture(number: int) -> Picture:
    colours = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(np.kron(colours, np.ones((8, 8, 1), dtype=np.uint8)))
    file = io.BytesIO()
    image.save(file, "PNG")  # the server sees the very pixels that the model in process sees
    return Picture(f"{number:09d}", lambda: image, file.getvalue())


def words(answer: list[Caption] | Failure) -> str:
    """The text without its spaces: the server decodes a word at a time, and loses some."""
    assert isinstance(answer, list), answer
    return "".join(answer[0].text.split())


def test_the_server_says_what_the_same_model_says_in_process(folder, port, tmp_path):
    given = [picture(number) for number in range(8)]
    alone = dict(load(folder, **TOLD).caption(given))
    assert len({words(answer) for answer in alone.values()}) > 4
    url = f"http://127.0.0.1:{port}/v1"
    own = {"tokenizer": folder, "concurrency": 2, "retries": 2, "backoff_s": 0.1}
    served = load("endpoint", url=url, model=folder, **own, **TOLD)
    tiny = Picture("1x1", lambda: Image.new("RGB", (1, 1)))
    with serving(port, tmp_path):
        found = dict(served.caption([*given, tiny]))
        missing = load("endpoint", url=url, model="nobody/nothing", retries=1, **TOLD)
        with pytest.raises(BadSetting, match="model=nobody/nothing"):
            dict(missing.caption(given))
    small = found.pop("1x1")  # this server stumbles over it
    assert isinstance(small, Failure)
    assert small.reason == "server: 500"
    for answer in found.values():
        assert isinstance(answer, list), answer
        (caption,) = answer
        assert caption.finish_reason == "stop"  # whatever the reason was, this server says so
        assert caption.tokens is not None  # counted here: it does not count
    assert {key: words(a) for key, a in found.items()} == {k: words(a) for k, a in alone.items()}
    assert served.counters["requests that failed: 500"] in (3, 6)


def test_it_may_be_killed_and_come_back(folder, port, tmp_path):
    given = [picture(number) for number in range(12)]
    captioner = load(
        "endpoint",
        url=f"http://127.0.0.1:{port}/v1",
        model=folder,
        concurrency=2,
        retries=600,
        backoff_s=0.25,
        **TOLD,
    )
    stream = captioner.caption(given)
    with serving(port, tmp_path) as server:
        found = [next(stream) for _ in range(2)]
        os.kill(server.pid, signal.SIGKILL)
    with serving(port, tmp_path):
        found += stream
    assert sorted(key for key, _ in found) == [one.key for one in given]
    alone = dict(load(folder, **TOLD).caption(given))
    assert {key: words(a) for key, a in found} == {key: words(a) for key, a in alone.items()}

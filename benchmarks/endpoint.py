"""The captioner `endpoint` against a bare load generator: same pictures, same server, same run."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import aiohttp
import numpy as np
from PIL import Image

from benchmarks.rows import REPEATS, Row
from captioning import Captioner, Picture, load

SERVICE_S = 0.25  # of the server, for each request
CONCURRENCY = 32  # so at best 128 requests a second
REQUESTS = 1024
GRAIN = 8.6  # of 255, standard deviation: makes the pictures' files 50 kB large


def rows() -> Iterator[Row]:
    pictures = _pictures(64)
    bare, ours, spent = [], [], []
    with _server() as url:
        # The first shard's first request goes alone: once a worker, so outside the clock.
        captioner = load("endpoint", url=url, model="stub", prompt="short", concurrency=CONCURRENCY)
        _ours(captioner, pictures, 128)
        for _ in range(REPEATS):
            bare.append(_bare(url, pictures, REQUESTS))
            started = time.process_time()
            ours.append(_ours(captioner, pictures, REQUESTS))
            spent.append((time.process_time() - started) / REQUESTS)
    ratios = [one / other for one, other in zip(ours, bare, strict=True)]
    ratio = statistics.median(ratios)
    size = statistics.mean(len(data) for data in pictures) / 1000
    yield Row(
        f"captioner `endpoint`, pictures of {size:.0f} kB, a server that takes "
        f"{SERVICE_S * 1000:.0f} ms, concurrency {CONCURRENCY}: requests a second against a bare "
        "load generator with ready-made bodies",
        f"{statistics.median(ours):.1f} against {statistics.median(bare):.1f}: {ratio:.1%} "
        f"({min(ratios):.1%}–{max(ratios):.1%}); {1000 * statistics.median(spent):.1f} ms of "
        "one core a picture",
        "at least 95 %",
        ratio >= 0.95,
    )


def _ours(captioner: Captioner, pictures: list[bytes], count: int) -> float:
    """Captions a second, from files to texts."""
    given = (_picture(n, pictures[n % len(pictures)]) for n in range(count))
    started = time.perf_counter()
    found = dict(captioner.caption(given))
    took = time.perf_counter() - started
    assert len(found) == count
    assert all(isinstance(answer, list) for answer in found.values())
    return count / took


def _bare(url: str, pictures: list[bytes], count: int) -> float:
    """Requests a second of bodies that are ready in memory, whose answers nobody reads."""
    bodies = [_body(data) for data in pictures]

    async def run() -> float:
        connector = aiohttp.TCPConnector(limit=0)
        headers = {"Content-Type": "application/json"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            numbers = iter(range(count))

            async def ask() -> None:
                for number in numbers:
                    body = bodies[number % len(bodies)]
                    async with session.post(f"{url}/chat/completions", data=body) as response:
                        assert response.status == 200
                        await response.read()

            started = time.perf_counter()
            await asyncio.gather(*(ask() for _ in range(CONCURRENCY)))
            return count / (time.perf_counter() - started)

    return asyncio.run(run())


def _body(data: bytes) -> bytes:
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {
            "type": "text",
            "text": "Describe this picture in one short sentence of at most 15 words.",
        },
    ]
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": "stub", "messages": messages, "max_tokens": 256}).encode()


def _picture(number: int, data: bytes) -> Picture:
    return Picture(f"{number:09d}", lambda: Image.open(io.BytesIO(data)).convert("RGB"), data)


def _pictures(count: int) -> list[bytes]:
    """JPEGs of 512 x 512 pixels with grain."""
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        pixels = np.asarray(smooth.resize((512, 512), Image.Resampling.BICUBIC), dtype=float)
        grain = rng.normal(0, GRAIN, (512, 512, 1))
        file = io.BytesIO()
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG")
        made.append(file.getvalue())
    return made


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """In a process of its own; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tests.captioning.helpers.openai_server",
        str(port),
        str(SERVICE_S),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.kill()

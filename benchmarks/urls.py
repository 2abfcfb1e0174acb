"""A list of links to tars: ours against the img2dataset command, pictures a second of one core.

The server runs in a process of its own, whose CPU counts for neither. Photographs do not ship with
the environment, so pictures are noise with a photograph's spectrum: 130 and 640 KB at quality 90.
Each side runs on a few links as well, and the difference counts: start-up is not what is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from benchmarks.decode import _photo
from benchmarks.rows import Row

PICTURES = int(os.environ.get("BENCH_PICTURES", "5000"))
FEW = 50  # links that show what start-up takes
SIZES = ((640, 480), (1500, 1000))
DISTINCT = 12  # pictures of each size, given again and again: ours must not drop duplicates
SIDE = 256  # of the output, pixels
RATIO = 1.5  # wanted


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name, _serving() as port:
        folder = Path(name)
        spent = {}
        for side, run in (("img2dataset", _theirs), ("ours", _ours)):
            few = _measured(lambda run=run: run(folder, port, FEW))
            many = _measured(lambda run=run: run(folder, port, FEW + PICTURES))
            spent[side] = [b - a for a, b in zip(few, many, strict=True)]
    rate = {side: [PICTURES / seconds for seconds in found] for side, found in spent.items()}
    ratio = rate["ours"][0] / rate["img2dataset"][0]
    yield Row(
        f"download {PICTURES} JPEGs (640×480 and 1500×1000, loopback) to tars at {SIDE} px, q95, "
        f"one worker, against img2dataset {version('img2dataset')}",
        f"{ratio:.2f}× ({rate['ours'][0]:.0f} against {rate['img2dataset'][0]:.0f} pictures/s of "
        f"a core; by the clock {rate['ours'][1]:.0f} against {rate['img2dataset'][1]:.0f})",
        f"{RATIO}×",
        ratio >= RATIO,
    )


def _measured(run) -> tuple[float, float]:
    """(CPU seconds of the processes that it starts and awaits, seconds by the clock)"""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before, started = cpu(), time.perf_counter()
    run()
    return cpu() - before, time.perf_counter() - started


def _theirs(folder: Path, port: int, count: int) -> None:
    out = folder / f"theirs{count}"
    command = [str(Path(sys.executable).with_name("img2dataset")), "--url_list"]
    command += [_list(folder, port, count), "--output_folder", str(out)]
    command += ["--input_format", "csv", "--caption_col", "caption", "--output_format"]
    command += ["webdataset", "--image_size", str(SIDE), "--resize_mode", "keep_ratio"]
    command += ["--encode_quality", "95", "--processes_count", "1"]
    _run(command)
    stats = json.loads((out / "00000_stats.json").read_text())
    assert stats["successes"] == count, stats


def _ours(folder: Path, port: int, count: int) -> None:
    root = folder / f"ours{count}"
    _run([sys.executable, "-m", "benchmarks.urls", _list(folder, port, count), str(root)])
    (stats,) = root.glob("urls/images/00000*_stats.json")
    assert json.loads(stats.read_text())["successes"] == count, stats.read_text()


def _run(command: list[str]) -> None:
    # One thread a worker, as the pool gives it; nobody asks for newer versions.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[:3]}: {done.stderr[-2000:]}")


def _list(folder: Path, port: int, count: int) -> str:
    path = folder / f"list{count}.csv"
    lines = [f"http://127.0.0.1:{port}/{i}.jpg,picture number {i}" for i in range(count)]
    path.write_text("\n".join(["url,caption", *lines]) + "\n")
    return str(path)


def _download(url_list: str, root: str) -> None:
    """The stage as a worker runs it: one process, one shard after the other."""
    from pipeline.core.catalog import Catalog
    from pipeline.core.rules import Rules
    from pipeline.core.store import Store
    from pipeline.sources.urls import Urls
    from pipeline.stages.download import Download

    source = Urls(url_list=url_list, allow_private_hosts=True, host_rate=0, host_concurrency=64)
    rules = Rules(image_size=SIDE, min_image_size=0, drop_duplicates=False)
    stage = Download("urls", source, rules=rules)
    store = Store(root)
    work = stage.open(store)
    for job in stage.plan(Catalog(store)):
        work(job)


@contextlib.contextmanager
def _serving() -> Iterator[int]:
    """The port of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ready = context.SimpleQueue()
    process = context.Process(target=_serve, args=(ready,), daemon=True)
    process.start()
    try:
        yield ready.get()
    finally:
        process.terminate()
        process.join()


def _serve(ready) -> None:
    """Gives /N.jpg for any N."""
    from aiohttp import web

    pictures = [_photo(*size, seed) for seed in range(DISTINCT) for size in SIZES]

    async def answer(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if not name.endswith(".jpg"):
            return web.Response(status=404)
        body = pictures[int(name.removesuffix(".jpg")) % len(pictures)]
        return web.Response(body=body, content_type="image/jpeg")

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/{name}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        assert site._server is not None
        ready.put(site._server.sockets[0].getsockname()[1])  # pyright: ignore
        await asyncio.Event().wait()

    asyncio.run(main())


if __name__ == "__main__":
    _download(*sys.argv[1:])

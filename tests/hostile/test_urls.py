"""Every hostile link, through the urls source and the download stage."""

from __future__ import annotations

import gzip
import time
from itertools import repeat

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.sources.urls import Urls
from pipeline.stages.download import Download
from tests.hostile import urls
from tests.hostile.pictures import HTML, jpeg
from tests.pipeline.helpers import web
from tests.pipeline.helpers.roots import run_here

pytestmark = pytest.mark.slow  # img2dataset takes seconds to import
DEADLINE_S = 3


def verdicts(folder, links: list[str], **settings) -> list[tuple[str, str]]:
    """(status, detail) of each link, in order."""
    folder.mkdir()
    table = pa.table({"url": links, "caption": [f"link {n}" for n in range(len(links))]})
    pq.write_table(table, folder / "list.parquet")
    source = Urls(url_list=str(folder / "list.parquet"), **settings)
    store = Store(folder / "root")
    run_here(Download("urls", source, max_reject_rate=1.0), store)
    rows = from_parquet(store.read("urls/images/00000.parquet")).to_pylist()
    return [(row["status"], row["error_message"]) for row in rows]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """case -> (status, detail)."""
    home = tmp_path_factory.mktemp("links")
    outside = [case for case in urls.CASES if not case.local]
    served = [case for case in urls.CASES if case.local]
    given = [case.make().decode() for case in outside]
    result = dict(zip((c.name for c in outside), verdicts(home / "outside", given), strict=True))
    with web.serving() as server:
        routes(server)
        given = [case.make().decode().replace(urls.SERVER, server.url) for case in served]
        limits = {"timeout": 1, "deadline": DEADLINE_S, "retries": 0, "max_bytes": 1_000_000}
        began = time.monotonic()
        answers = verdicts(home / "served", given, allow_private_hosts=True, **limits)
        assert time.monotonic() - began < 4 * DEADLINE_S
        assert not any("x-evil" in hit.headers for hit in server.hits)
    return result | dict(zip((c.name for c in served), answers, strict=True))


def routes(server: web.Web) -> None:
    server.add("/good.jpg", jpeg(3000))
    server.route("/redirect", web.redirect("file:///etc/passwd"))
    server.route("/loop", web.redirect("/loop"))
    server.route("/html.jpg", web.data(HTML, Content_Type="image/jpeg"))
    server.add("/nothing.jpg", b"")
    server.route("/endless.jpg", web.chunked(repeat(bytes(100_000))))
    server.route("/short.jpg", web.short(jpeg(3001)))
    server.route("/drip.jpg", web.drip(jpeg(3002), pause_s=0.5))
    bomb = gzip.compress(bytes(64 << 20), mtime=0)
    server.route("/bomb.jpg", web.data(bomb, Content_Encoding="gzip"))
    server.add("/noai.jpg", jpeg(3003), X_Robots_Tag="noai")


@pytest.mark.parametrize("case", urls.CASES, ids=lambda case: case.name)
def test_verdict(found, case):
    status, detail = found[case.name]
    assert status.replace("success", "sample") == case.verdict, detail
    assert "passwd" not in (detail or "")

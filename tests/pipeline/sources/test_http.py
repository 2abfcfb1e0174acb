from __future__ import annotations

import asyncio
import gzip
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from aiohttp.abc import AbstractResolver
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pipeline.sources.web import answer, client, site_rules
from pipeline.sources.web.address import Refused, anyone, parse, public_only, spelled
from pipeline.sources.web.client import Client, Hooks
from pipeline.sources.web.fetch import fetch_all
from pipeline.sources.web.limits import Limiter, Order
from pipeline.sources.web.settings import FetchError, HttpSettings
from tests.pipeline.helpers import web as servers
from tests.pipeline.helpers.web import Web, serving

PICTURE = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 20
SECRET = "signature-d41d8cd9"


@pytest.fixture
def web():
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No waiting between tries, and no robots.txt remembered of an earlier server's port."""
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    site_rules._known.clear()


def settings(**changes) -> HttpSettings:
    base = {"allow_private_hosts": True, "host_rate": 0, "robots": False, "retries": 1}
    return HttpSettings.model_validate({**base, "timeout": 5, "deadline": 20, **changes})


def get(url: str, seam: Hooks | None = None, **changes) -> bytes | FetchError:
    (found,) = fetch_all(settings(**changes), [url], seam)
    return found


def failure(url: str, seam: Hooks | None = None, **changes) -> tuple[str, str]:
    """(reason, detail) of a link that must give no picture."""
    found = get(f"{url}{'&' if '?' in url else '?'}token={SECRET}", seam, **changes)
    assert isinstance(found, FetchError), found[:100]
    assert SECRET not in str(found)
    return found.reason, str(found)


class Names(AbstractResolver):
    """Names of hosts -> addresses; each lookup takes the next of several answers."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): found for name, found in answers.items()}
        self.asked: list[str] = []

    async def resolve(self, host, port=0, family=0):
        self.asked.append(host)
        answers = self.answers[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in addresses
        ]

    async def close(self) -> None:
        pass


def only_the_server(address: str) -> str | None:
    """127.0.0.1 stands for the public internet; all else is judged as ever."""
    return None if address == "127.0.0.1" else public_only(address)


# ---- what comes


def test_many_links_come_in_order_over_few_connections(web):
    urls = [web.add(f"/{i}.jpg", PICTURE + bytes([i])) for i in range(100)]
    found = list(fetch_all(settings(host_concurrency=4), urls))
    assert found == [PICTURE + bytes([i]) for i in range(100)]
    assert web.connections <= 4


def test_failures_stand_where_their_links_stood(web):
    good = web.add("/good.jpg", PICTURE)
    slow = web.route("/slow.jpg", lambda h: (time.sleep(0.3), h.answer(200, PICTURE + b"slow")))
    found = list(fetch_all(settings(), [slow, web.url + "/gone.jpg", good, "ftp://x/", good]))
    assert found[0] == PICTURE + b"slow"
    assert [getattr(f, "reason", None) for f in found] == [
        *(None, "failed_to_download", None, "refused", None)
    ]


def test_it_says_who_it_is_and_asks_for_no_compression(web):
    get(web.add("/a.jpg", PICTURE), user_agent_token="mybot")
    (hit,) = web.hits
    assert "compatible; mybot" in hit.headers["user-agent"]
    assert hit.headers["accept-encoding"] == "identity"
    assert "cookie" not in hit.headers


def test_a_query_reaches_the_server_as_it_is_spelled(web):
    query = "/a.jpg?sig=a%2Fb%2bc+d%20e&x=%7E~&y=[1]|"
    web.add("/a.jpg", PICTURE)
    assert get(web.url + query) == PICTURE
    assert web.hits[0].path == query


def test_a_link_that_needs_encoding_is_encoded(web):
    web.add("/a%20b/%C3%BC.jpg", PICTURE)
    assert get(web.url + "/a b/ü.jpg ") == PICTURE


def test_proxies_of_the_environment_are_not_asked(web, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get(web.add("/a.jpg", PICTURE)) == PICTURE


# ---- what goes wrong


def test_a_link_that_is_gone_is_asked_for_once(web):
    assert failure(web.url + "/gone.jpg") == ("failed_to_download", "HTTP 404")
    assert len(web.hits) == 1


@pytest.mark.parametrize("bad", ["503", "429", "reset", "broken", "silent", "short"])
def test_what_may_go_better_is_tried_again(web, bad):
    routes = {
        "503": servers.status(503),
        "429": servers.status(429),
        "reset": servers.reset(),
        "broken": servers.reset(PICTURE[:100]),
        "silent": servers.silence(0.7),
        "short": servers.short(PICTURE),
    }
    url = web.route("/a.jpg", servers.first(1, routes[bad], servers.data(PICTURE)))
    assert get(url, timeout=0.3 if bad == "silent" else 5) == PICTURE
    assert len(web.hits) == 2


@pytest.mark.parametrize(
    ("bad", "detail"),
    [
        (servers.status(500), "HTTP 500 (try 2 of 2)"),
        (servers.reset(), "127.0.0.1: connection failed: ECONNRESET (try 2 of 2)"),
        (servers.reset(PICTURE), "the connection ended after 5,124 of 6,124 bytes"),
        (servers.short(PICTURE), "the connection ended after 5,124 of 6,124 bytes"),
        (servers.silence(0.8), "127.0.0.1: nothing came for 0.4 s"),
        (servers.status(200), "an empty answer with status 200"),
        (servers.status(302), "HTTP 302 without a Location"),
        (servers.status(204), "HTTP 204"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), "no HTTP"),
    ],
)
def test_what_stays_bad_is_a_failed_download(web, bad, detail):
    timeout = 0.4 if "nothing came" in detail else 5
    reason, text = failure(web.route("/a.jpg", bad), timeout=timeout)
    assert reason == "failed_to_download"
    assert text.startswith(detail)


def test_a_slow_drip_ends_at_the_deadline(web):
    started = time.monotonic()
    reason, detail = failure(web.route("/a.jpg", servers.drip(PICTURE)), deadline=0.6)
    assert (reason, detail) == ("failed_to_download", "not whole after 0.6 s, the deadline")
    assert time.monotonic() - started < 5  # of 256


def test_a_host_that_is_not_there(web):
    reason, detail = failure("http://nowhere.invalid/a.jpg")
    assert reason == "failed_to_download"
    assert detail.startswith("nowhere.invalid: ")
    reason, detail = failure("http://127.0.0.1:9/a.jpg")
    assert (reason, detail) == (
        "failed_to_download",
        "127.0.0.1: connection failed: ECONNREFUSED (try 2 of 2)",
    )


def test_a_server_that_sends_more_than_it_announced_spoils_at_most_its_own_next_answer(web):
    forged = b"HTTP/1.1 200 OK\r\n\r\nhaha"
    long = web.route("/long", servers.long(PICTURE + forged, len(PICTURE)))
    following = web.add("/next.jpg", PICTURE + b"next")
    found = list(fetch_all(settings(host_concurrency=1, deadline=1), [long, following]))
    assert found[0] == PICTURE
    # What was forged may come late enough to be taken for the answer to the next request.
    assert found[1] == PICTURE + b"next" or str(found[1]).startswith("not whole after 1 s")


@pytest.mark.parametrize("kind", ["text/html", "image/jpeg"])
def test_a_page_with_status_200_is_no_picture(web, kind):
    page = b"\n <!DOCTYPE html><html>gone</html>"
    url = web.route("/a.jpg", servers.data(page, Content_Type=kind))
    assert failure(url) == ("undecodable", f"a page and no picture ({kind}, {len(page)} bytes)")


def test_a_picture_that_is_called_a_page_is_one(web):
    assert get(web.route("/a.jpg", servers.data(PICTURE, Content_Type="text/html"))) == PICTURE


def test_more_bytes_than_allowed(web):
    long = web.add("/a.jpg", PICTURE)
    assert failure(long, max_bytes=5000) == ("too-large", "5,124 bytes; the limit is 5,000")
    sent = []

    def endless():
        while True:
            sent.append(1)
            yield b"x" * 10_000

    url = web.route("/b.jpg", servers.chunked(endless()))
    assert failure(url, max_bytes=100_000) == ("too-large", "over 100,000 bytes")
    assert len(sent) < 2000


def test_a_content_coding_that_nobody_asked_for(web):
    url = web.route("/a", servers.data(gzip.compress(PICTURE), Content_Encoding="gzip"))
    assert get(url) == PICTURE
    bomb = servers.data(gzip.compress(b"\xff" * 10_000_000), Content_Encoding="gzip")
    assert failure(web.route("/b", bomb), max_bytes=100_000) == (
        "too-large",
        "over 100,000 bytes once uncompressed",
    )
    assert failure(web.route("/c", servers.data(PICTURE, Content_Encoding="gzip")))[0] == (
        "undecodable"
    )
    assert failure(web.route("/d", servers.data(PICTURE, Content_Encoding="br"))) == (
        "undecodable",
        "content coding br, which nobody asked for",
    )


@pytest.mark.parametrize("header", [b"Content-Type: \xff/\x80", b"Content-Encoding: \xff"])
def test_what_a_header_holds_can_be_written_down(web, header):
    def route(handler) -> None:
        handler.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n" + header + b"\r\n\r\n<html>"
        )

    reason, detail = failure(web.route("/a.jpg", route))
    assert reason == "undecodable"
    assert "\\udcff" in detail
    detail.encode()  # as the parquet does


# ---- waiting as the server asks


def test_retry_after_is_honoured_by_all_links_of_the_host(web):
    first = web.route(
        "/a.jpg", servers.first(1, servers.status(429, Retry_After="1"), servers.data(PICTURE))
    )
    others = [web.add(f"/{i}.jpg", PICTURE) for i in range(3)]
    links = [first, *others]
    assert list(fetch_all(settings(host_concurrency=1, deadline=5), links)) == [PICTURE] * 4
    begun = web.hits[0].at
    assert all(hit.at - begun >= 0.99 for hit in web.hits[1:])


def test_a_server_that_asks_for_more_patience_than_there_is(web):
    busy = web.route("/a.jpg", servers.status(503, Retry_After="3600"))
    started = time.monotonic()
    found = list(fetch_all(settings(host_concurrency=1), [busy, web.add("/b.jpg", PICTURE)]))
    assert time.monotonic() - started < 10  # of 3600
    assert [str(f) for f in found] == [
        "HTTP 503 (try 1 of 2); it asks to wait 3600 s",
        "127.0.0.1 asks to wait 3600 s",
    ]


def test_retry_after_is_seconds_or_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert answer.retry_after("120") == 120
    assert answer.retry_after(later) == pytest.approx(100, abs=2)
    assert answer.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert answer.retry_after("soon") is None
    assert answer.retry_after("-5") is None
    assert answer.retry_after("Mon, 01 Jan 99999999999999999999 00:00:00 GMT") is None
    assert answer.retry_after("Mon, 01 Jan 2020 00:00:00 +99999999999999999999") is None
    assert answer.retry_after(None) is None


# ---- limits


def busy(handler) -> None:
    time.sleep(0.02)
    handler.answer(200, PICTURE)


def test_connections_to_one_host_are_limited(web):
    urls = [web.route(f"/{i}", busy) for i in range(20)]
    list(fetch_all(settings(host_concurrency=3), urls))
    assert 1 < web.open_most <= 3 + 1  # the one that is wanted next gets in


def test_links_under_way_are_limited_over_all_hosts(web):
    port = web.url.rpartition(":")[2]
    names = {f"h{i}_test": [["127.0.0.1"]] for i in range(10)}
    urls = [f"http://h{i % 10}.test:{port}/{i}" for i in range(40)]
    for i in range(40):
        web.route(f"/{i}", busy)
    list(fetch_all(settings(thread_count=4), urls, Hooks(Names(**names))))
    assert 1 < web.open_most <= 4 + 1


def test_requests_to_one_host_are_paced(web):
    urls = [web.add(f"/{i}", PICTURE) for i in range(11)]
    assert list(fetch_all(settings(host_rate=20, deadline=0.3), urls)) == [PICTURE] * 11
    gaps = [b.at - a.at for a, b in zip(web.hits, web.hits[1:], strict=False)]
    assert sum(gaps) >= 0.49  # and no link's deadline of 0.3 s was spent on waiting its turn


def test_a_host_that_keeps_failing_is_given_up(web):
    urls = [web.route(f"/{i}", servers.status(500)) for i in range(30)]
    found = list(fetch_all(settings(host_concurrency=1, host_failures=5, retries=0), urls))
    assert len(web.hits) == 5
    assert str(found[-1]) == "127.0.0.1 is given up after 5 failures in a row"
    assert {f.reason for f in found if isinstance(f, FetchError)} == {"failed_to_download"}


def test_dead_links_are_no_failures_of_their_host(web):
    urls = [f"{web.url}/{i}" for i in range(30)]
    found = list(fetch_all(settings(host_concurrency=1, host_failures=5), urls))
    assert {str(f) for f in found} == {"HTTP 404"}


def test_a_redirecting_host_is_not_blamed_for_where_it_leads(web):
    port = web.url.rpartition(":")[2]
    seam = Hooks(Names(short_test=[["127.0.0.1"]], dead_test=[["127.0.0.1"]]))
    urls = []
    for i in range(6):
        web.route(f"/{i}", servers.redirect(f"http://dead.test:{port}/dead"))
        urls.append(f"http://short.test:{port}/{i}")
    web.route("/dead", servers.status(500))
    web.add("/alive", PICTURE)
    urls.append(f"http://short.test:{port}/alive")
    *_, last = fetch_all(settings(host_concurrency=1, host_failures=3, retries=0), urls, seam)
    assert last == PICTURE


def test_memory_is_bounded_and_nothing_locks(web, monkeypatch):
    """The first link comes last, and the rest does not fit into memory until it is taken."""
    monkeypatch.setattr(client, "MEMORY", 30_000)
    held, most = 0, 0

    async def counted(response, limit, real=client.read_picture):
        nonlocal held, most
        body = await real(response, limit)
        held += len(body)
        most = max(most, held)
        return body

    monkeypatch.setattr(client, "read_picture", counted)
    late = servers.first(1, servers.status(503), servers.data(PICTURE))
    urls = [web.route("/late", lambda h: (time.sleep(0.2), late(h)))]
    urls += [web.add(f"/{i}", PICTURE) for i in range(50)]
    for found in fetch_all(settings(max_bytes=6000, host_concurrency=2, deadline=5), urls):
        assert found == PICTURE
        held -= len(PICTURE)
    assert most <= 30_000 + 6000


def test_a_consumer_that_stops_early_leaves_no_thread(web):
    urls = [web.route(f"/{i}", servers.silence(0.3)) for i in range(20)]
    bodies = fetch_all(settings(), [web.add("/a", PICTURE), *urls])
    assert next(bodies) == PICTURE
    bodies.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "links"]


def test_an_error_of_ours_is_no_failed_download(web, monkeypatch):
    async def broken(self, index, url):
        raise ZeroDivisionError

    monkeypatch.setattr(Client, "fetch", broken)
    with pytest.raises(ZeroDivisionError):
        list(fetch_all(settings(), [web.url]))


# ---- redirects


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("/caf\xe9.jpg", "/caf%E9.jpg"),  # a byte of Latin-1
        ("/caf\xc3\xa9.jpg?q=\xe9&s=a%2Fb", "/caf%C3%A9.jpg?q=%E9&s=a%2Fb"),
        ("/\xb2\xe2.jpg", "/%B2%E2.jpg"),  # GBK
        ("/a b.jpg", "/a%20b.jpg"),
    ],
)
def test_a_redirect_to_bytes_asks_for_these_bytes(web, location, path):
    web.route("/old", servers.redirect(location))
    web.route(path, servers.data(PICTURE))
    assert get(web.url + "/old", robots=False) == PICTURE
    assert [hit.path for hit in web.hits] == ["/old", path]


def test_a_redirect_to_a_host_of_another_script():
    assert spelled("http://b\udcfccher.test/\udce9") == "http://xn--bcher-kva.test/%E9"
    assert spelled("//bücher.test:8080/é") == "//xn--bcher-kva.test:8080/%C3%A9"
    assert spelled("é?a:b//c") == "%C3%A9?a:b//c"


def test_long_headers_cost_no_picture(web):
    cookie = "x" * 40_000
    web.add("/a.jpg", PICTURE, Set_Cookie=cookie, Content_Security_Policy=cookie)
    assert get(web.url + "/a.jpg") == PICTURE
    web.add("/b.jpg", PICTURE, Set_Cookie="x" * 200_000)
    assert failure(web.url + "/b.jpg")[1].startswith("no HTTP")


def test_redirects_are_followed_and_counted(web):
    web.add("/there/a.jpg", PICTURE)
    web.route("/three", servers.redirect(web.url + "/two", 301))
    web.route("/two", servers.redirect("there/one?x=1", 307))
    web.route("/there/one", servers.redirect("a.jpg", 303))
    assert get(web.url + "/three", max_redirects=3) == PICTURE
    assert failure(web.url + "/three", max_redirects=2) == (
        "failed_to_download",
        "over 2 redirects",
    )
    loop = web.route("/loop", servers.redirect("/loop"))
    assert failure(loop) == ("failed_to_download", "over 5 redirects")


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/a.jpg",
        "data:image/png;base64,AAAA",
        "gopher://127.0.0.1/",
        "//169.254.169.254/latest/meta-data/",
        "http://[::ffff:127.0.0.2]/",
        "http://[fd00:ec2::254]/latest/",
        "http://2130706434/",
        "http://0x7f.0.0.2/",
        "http://private.test/",
        "http://mixed.test/",
        "http://[::1/",
        "http://[::1]@",
    ],
)
def test_a_redirect_is_judged_like_any_link(web, target):
    names = Names(private_test=[["10.0.0.1"]], mixed_test=[["192.168.0.1", "fd00::1"]])
    url = web.route("/a.jpg", servers.redirect(target))
    reason, detail = failure(
        url, Hooks(names, only_the_server), allow_private_hosts=False, retries=0
    )
    assert reason == "refused", detail


# ---- who may be asked


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://example.org/a.jpg", "data:image/png;base64,AAAA"),
        *(
            "s3://bucket/a.jpg",
            "/etc/passwd",
            "a.jpg",
            "",
            "http://",
            "http:///a.jpg",
            "javascript:1",
        ),
        *("http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://0177.0.0.1/"),
        *("http://127.1/", "http://127.0.0.1./", "http://１２７.0.0.1/", "http://1.2.3/"),
        *("http://127.0.0.1/", "http://[::1]/", "http://[::]/", "http://0.0.0.0/"),
        *("http://169.254.169.254/latest/meta-data/", "http://[fd00:ec2::254]/"),
        *("http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[::127.0.0.1]/"),
        *("http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://[fe80::1%25eth0]/"),
        *("http://user@127.0.0.1/", "http://example.org@127.0.0.1/", "http://h\\@127.0.0.1/"),
        *(
            "http://127.0.0.1:99999/",
            "http://[::1",
            "http://[::1]@",
            "http://127。0。0。1/",
            "http://①②⑦.⓪.⓪.①/",
        ),
        *(
            "http://%31%32%37.0.0.1/",
            "http://127.0.0.1%00.example.org/",
            "http://a b/",
            "http://./",
        ),
        *(f"http://{'a' * 300}.org/", "http://example.org\r\nHost: inner/", "http:example.org"),
    ],
)
def test_links_that_are_refused_before_any_lookup(url):
    with pytest.raises(Refused):
        parse(url, public_only)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.10", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255"),
        *("192.168.1.1", "169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200"),
        *("192.0.0.192", "192.0.2.1", "198.18.0.1", "203.0.113.9", "224.0.0.1", "239.1.1.1"),
        *("240.0.0.1", "255.255.255.255", "168.63.129.16"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1"),
        *("ff02::1", "2001:db8::1", "::ffff:8.8.8.8", "::ffff:10.0.0.1", "::8.8.8.8"),
        *("64:ff9b::808:808", "64:ff9b:1::1", "2002:808:808::1", "2001:0:808:808::1"),
        *("100::1", "::ffff:0:127.0.0.1", "5f00::1", "3fff::1"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert public_only(address)
    assert anyone(address) is None


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00::1"]
)
def test_addresses_that_are_public(address):
    assert public_only(address) is None
    host = f"[{address}]" if ":" in address else address
    assert parse(f"http://{host}/a.jpg", public_only).raw_host == address


@examples(max_examples=50, deadline=None)
@given(st.text(max_size=60) | st.from_regex(r"https?://[^/]{1,40}/\S*", fullmatch=True))
def test_whatever_a_list_holds_is_a_link_or_refused(text):
    try:
        found = parse(text, public_only)
    except Refused:
        return
    host = found.raw_host or ""
    assert found.scheme in ("http", "https")
    try:
        # What the C library would take for an address without asking anyone.
        plain = socket.inet_ntoa(socket.inet_aton(host)) if ":" not in host else host
    except OSError:
        return
    assert plain == host
    assert public_only(plain) is None


def test_loopback_is_refused_unless_allowed(web):
    port = web.url.rpartition(":")[2]
    web.add("/a.jpg", PICTURE)
    for host in ("127.0.0.1", "localhost"):
        reason, detail = failure(f"http://{host}:{port}/a.jpg", allow_private_hosts=False)
        assert reason == "refused"
        assert "loopback" in detail
        assert "--allow-private-hosts" in detail
    assert web.connections == 0
    assert get(f"http://localhost:{port}/a.jpg", allow_private_hosts=True) == PICTURE


def test_of_a_names_addresses_only_public_ones_are_asked(web):
    port = int(web.url.rpartition(":")[2])
    names = Names(mixed_test=[["127.0.0.2", "127.0.0.1", "::1"]])
    with pytest.raises(OSError, match="refused"):  # else it could not be told apart
        socket.create_connection(("127.0.0.2", port))
    web.add("/a.jpg", PICTURE)
    url = f"http://mixed.test:{port}/a.jpg"
    assert get(url, Hooks(names, only_the_server), retries=0) == PICTURE


def test_a_name_that_changes_its_address_gets_nowhere(web, monkeypatch):
    """Rebinding: public when it is looked up first, private a moment later."""
    port = web.url.rpartition(":")[2]
    with serving(host="127.0.0.2") as inner:
        inner_port = inner.url.rpartition(":")[2]
        inner.add("/secret", PICTURE)
        names = Names(rebind_test=[["127.0.0.1"], ["127.0.0.2"]])
        # Nothing but the resolver that judges looks names up.
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a second lookup"))
        web.route("/a", servers.redirect(f"http://rebind.test:{inner_port}/secret"))
        reason, detail = failure(
            f"http://rebind.test:{port}/a", Hooks(names, only_the_server), retries=0
        )
        assert (reason, detail) == (
            "refused",
            "rebind.test is 127.0.0.2: a loopback address",
        )
        assert names.asked == ["rebind.test", "rebind.test"]
        assert (web.connections, inner.connections) == (1, 0)


# ---- manners


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("User-agent: *\nDisallow: /", False),
        ("User-agent: *\nDisallow:", True),
        ("User-agent: *\nDisallow: /b/", True),
        ("User-agent: otherbot\nDisallow: /", True),
        ("User-agent: microdit\nDisallow: /a/", False),
        ("User-agent: *\nDisallow: /\n\nUser-agent: microdit\nAllow: /", False),  # img2dataset: *
        ("User-agent: img2dataset\nDisallow: /", False),
        ("# who\nUSER-AGENT : MicroDiT/2.0 \r\nuser-agent: x\r\ndisallow : /*.jpg$ # all", False),
    ],
)
def test_robots_txt_is_asked_for_first_and_honoured(web, text, allowed):
    web.add("/robots.txt", text.encode())
    urls = [web.add(f"/a/{i}.jpg", PICTURE) for i in range(5)]
    found = list(fetch_all(settings(robots=True), urls))
    assert web.count("/robots.txt") == 1
    assert len(web.hits) == (6 if allowed else 1)
    if not allowed:
        assert {
            (f.reason, str(f).split(" to ")[0]) for f in found if isinstance(f, FetchError)
        } == {("opted-out", "robots.txt of 127.0.0.1 forbids it")}
    list(fetch_all(settings(robots=True), urls))
    assert web.count("/robots.txt") == 1  # remembered by the process
    assert list(fetch_all(settings(robots=False), urls)) == [PICTURE] * 5


def test_a_site_without_robots_txt_allows_all(web):
    assert get(web.add("/a.jpg", PICTURE), robots=True) == PICTURE
    web.route("/robots.txt", servers.redirect("/elsewhere.txt"))
    web.add("/elsewhere.txt", b"User-agent: *\nDisallow: /")
    site_rules._known.clear()
    assert failure(web.url + "/a.jpg", robots=True)[0] == "opted-out"


@pytest.mark.parametrize("bad", [servers.status(503), servers.silence(0.8), servers.reset()])
def test_a_site_whose_robots_txt_fails_is_left_alone_for_now(web, bad):
    web.route("/robots.txt", bad)
    reason, detail = failure(web.add("/a.jpg", PICTURE), robots=True, retries=0, timeout=0.5)
    assert reason == "failed_to_download"  # so that --retry-failed asks again
    assert detail.startswith("robots.txt: ")
    assert web.count("/a.jpg") == 0


def test_robots_txt_that_drips_or_never_ends_is_bounded(web):
    web.route("/robots.txt", servers.drip(b"User-agent: *\n" * 100))
    web.add("/a.jpg", PICTURE)
    started = time.monotonic()
    reason, _ = failure(web.url + "/a.jpg", robots=True, retries=0, timeout=0.5)
    assert reason == "failed_to_download"
    assert time.monotonic() - started < 10  # of 70

    def endless():
        yield b"User-agent: *\nDisallow: /\n"
        while True:
            yield b"# nothing\n" * 1000

    web.route("/robots.txt", servers.chunked(endless()))
    assert failure(web.url + "/a.jpg", robots=True, timeout=5)[0] == "opted-out"


@pytest.mark.parametrize("tag", ["noai", "foo, NoImageAI", "microdit: noindex", "none"])
def test_a_header_that_forbids_is_honoured(web, tag):
    url = web.add("/a.jpg", PICTURE, X_Robots_Tag=tag)
    reason, detail = failure(url)
    assert reason == "opted-out"
    assert detail.startswith("X-Robots-Tag: no")
    assert get(url, disallowed_header_directives="") == PICTURE


@pytest.mark.parametrize("tag", ["nofollow", "otherbot: noai", "noarchive, max-snippet: 5", ""])
def test_a_header_that_does_not_concern_us(web, tag):
    assert get(web.add("/a.jpg", PICTURE, X_Robots_Tag=tag)) == PICTURE


# ---- TLS


@pytest.fixture
def secure(tmp_path, monkeypatch):
    """A server whose certificate is for localhost; the machine knows its authority."""
    root, context = servers.certificates(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(root))
    client.tls.cache_clear()
    with serving(context) as found:
        yield found
    client.tls.cache_clear()


def test_https_with_a_certificate_that_is_good(secure: Web):
    port = secure.url.rpartition(":")[2]
    for i in range(3):
        secure.add(f"/{i}.jpg", PICTURE)
    urls = [f"https://localhost:{port}/{i}.jpg" for i in range(3)]
    assert list(fetch_all(settings(), urls)) == [PICTURE] * 3


def test_a_certificate_for_another_name_is_refused(secure: Web):
    secure.add("/a.jpg", PICTURE)
    reason, detail = failure(secure.url + "/a.jpg")  # by its address
    assert reason == "failed_to_download"
    assert detail.startswith("TLS: ")
    assert "certificate is not valid for '127.0.0.1'" in detail
    assert secure.hits == []


def test_an_authority_that_nobody_knows_is_refused(secure: Web, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    client.tls.cache_clear()
    port = secure.url.rpartition(":")[2]
    secure.add("/a.jpg", PICTURE)
    reason, detail = failure(f"https://localhost:{port}/a.jpg")
    assert reason == "failed_to_download"
    assert detail.startswith("TLS: ")
    assert secure.hits == []


def test_one_tls_context_serves_the_process(secure: Web, monkeypatch):
    import ssl

    made = []
    real = ssl.create_default_context
    monkeypatch.setattr(
        ssl, "create_default_context", lambda *a, **k: made.append(1) or real(*a, **k)
    )
    port = secure.url.rpartition(":")[2]
    secure.add("/a.jpg", PICTURE)
    for _ in range(3):
        assert get(f"https://localhost:{port}/a.jpg") == PICTURE
    assert len(made) == 1


def test_the_clock_stands_still_while_a_link_waits():
    async def main() -> float:
        async with asyncio.timeout(None) as timeout:
            clock = client._Clock(timeout, 0.2)
            async with clock.stopped():
                await asyncio.sleep(0.3)
            return clock.left()

    assert 0.1 < asyncio.run(main()) <= 0.2


def test_room_is_given_in_order_and_what_is_wanted_next_gets_in():
    async def main() -> list[int]:
        order = Order()
        room = Limiter(10, order)
        order.advance(7)
        entered = []

        async def enter(index: int, amount: int) -> None:
            await room.take(index, amount)
            entered.append(index)

        tasks = {i: asyncio.create_task(enter(i, a)) for i, a in ((0, 8), (1, 4), (2, 1), (3, 2))}
        await asyncio.sleep(0)
        assert entered == [0]  # 2 would fit, but 1 came first
        order.advance(3)
        await asyncio.sleep(0)
        assert entered == [0, 3]
        await enter(3, 100)  # and once more, whatever it takes
        room.give(102)
        tasks[1].cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert entered == [0, 3, 3, 2]
        room.give(8 + 1)
        await asyncio.wait_for(room.take(9, 10), 1)  # all of it is free again
        return entered

    assert asyncio.run(main()) == [0, 3, 3, 2]


def test_room_that_is_given_to_one_who_left_is_given_on():
    async def main() -> None:
        room = Limiter(1, Order())
        await room.take(5)
        leaving, staying = (asyncio.create_task(room.take(i)) for i in (6, 7))
        await asyncio.sleep(0)
        room.give()
        leaving.cancel()  # after it was let in, before it knew
        await asyncio.wait_for(staying, 1)

    asyncio.run(main())

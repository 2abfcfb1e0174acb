from __future__ import annotations

import errno
import gzip
import hashlib
import importlib.util
import io
import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import build_stage, load_config
from pipeline.core.catalog import Catalog
from pipeline.core.commits import read_commit
from pipeline.core.errors import BrokenShard, SettingError
from pipeline.core.samples import RawImage, Reject
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.core.tars import read_samples
from pipeline.engine.plan import plan
from pipeline.sources.cifar_captions import CLASSES, CifarCaptions, pattern
from pipeline.sources.tables import url_lists, url_table
from pipeline.sources.urls import Urls
from pipeline.sources.web import site_rules
from pipeline.stages.download import Download
from tests.pipeline.helpers import web as servers
from tests.pipeline.helpers.roots import run_here, tree
from tests.pipeline.helpers.web import serving

IMAGES = "urls/images"
LISTS = "urls/lists"
ROWS = [(f"http://h/{i}.jpg", f"a caption, {i}") for i in range(7)]


@pytest.fixture
def web():
    site_rules._known.clear()  # an earlier server may have had the same port
    with serving() as found:
        yield found


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "root")


def photo(seed: int, width: int = 300, height: int = 260) -> bytes:
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def source(store: Store, **changes) -> Urls:
    base = {"allow_private_hosts": True, "host_rate": 0, "timeout": 5, "deadline": 20}
    made = Urls.model_validate({**base, "retries": 0, **changes})
    made.attach(store, LISTS)
    return made


def csv_of(path: Path, rows, header: str = "url,caption") -> str:
    lines = [header, *(f'{url},"{caption}"' for url, caption in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def rows_of(made: Urls) -> list[tuple[str | None, str | None]]:
    place = made._place()
    return [
        (row.url, row.caption) for s in made.shards() for row in url_lists.read(*place, s.spec[0])
    ]


# ---- lists


@pytest.mark.parametrize(
    "format", ["csv", "csv.gz", "tsv", "tsv.gz", "json", "json.gz", "jsonl", "jsonl.gz", "parquet"]
)
def test_every_format_of_img2dataset_gives_the_same_rows(tmp_path, store, format):
    kind = format.removesuffix(".gz")
    records = [{"URL": url, "TEXT": caption, "other": 1.5} for url, caption in ROWS]
    if kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        text = f"other{comma}URL{comma}TEXT\n" + "".join(
            f'1.5{comma}{url}{comma}"{caption}"\n' for url, caption in ROWS
        )
    elif kind == "json":
        text = json.dumps(records)
    else:
        text = "".join(json.dumps(record) + "\n" for record in records)
    path = tmp_path / f"list.{format}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        data = text.encode()
        path.write_bytes(gzip.compress(data) if format.endswith(".gz") else data)
    made = source(
        store, url_list=str(path), url_col="URL", caption_col="TEXT", number_sample_per_shard=3
    )
    assert rows_of(made) == ROWS
    assert [(s.id, s.split, s.spec[1]) for s in made.shards()] == [
        ("00000", "train", 3),
        ("00001", "train", 3),
        ("00002", "train", 1),
    ]
    # Content names the rows, whatever held them.
    same = source(store, url_list=csv_of(tmp_path / "same.csv", ROWS), number_sample_per_shard=3)
    assert same.shards() == made.shards()


def test_a_list_of_links_alone_needs_a_captioner(tmp_path, store):
    path = tmp_path / "list.txt"
    path.write_text("http://h/0.jpg\nhttp://h/1.jpg\n")
    with pytest.raises(SettingError, match=r"caption_col=caption: .* plain list of links"):
        source(store, url_list=str(path)).shards()
    made = source(store, url_list=str(path), caption_col="")
    assert rows_of(made) == [("http://h/0.jpg", None), ("http://h/1.jpg", None)]


def test_text_is_taken_as_it_is_written(tmp_path, store):
    """What the reader's libraries guess, they guess wrong: numbers, dates, null, commas."""
    texts = ["007", "null", "1e3", "True", "2020-01-01", "two\nlines", "NA"]
    links = [f"http://h/{i},w=5.jpg" for i in range(len(texts))]
    expected = list(zip(links, texts, strict=True))
    csv = tmp_path / "list.csv"
    csv.write_text("url,caption\n" + "".join(f'"{url}","{text}"\n' for url, text in expected))
    assert rows_of(source(store, url_list=str(csv))) == expected
    one = [("http://h/0", "007"), ("http://h/1", "1e3")]
    path = tmp_path / "list.json"
    records = [{"url": url, "caption": text} for url, text in one]
    path.write_text(json.dumps(records), encoding="utf-8-sig")  # with a mark, as Windows does
    assert rows_of(source(store, url_list=str(path))) == one
    path = tmp_path / "list.txt"
    path.write_text("\n".join(links))
    found = rows_of(source(store, url_list=str(path), caption_col=None))
    assert [url for url, _ in found] == links


def test_captions_of_several_lines_may_lie_anywhere(tmp_path, store):
    rows = [(f"http://h/{i}", f"line {i}\n{'x' * 60}") for i in range(30_000)]  # pyarrow: 1 MB
    assert rows_of(source(store, url_list=csv_of(tmp_path / "list.csv", rows))) == rows


@pytest.mark.parametrize("format", ["csv", "json", "jsonl"])
def test_a_column_that_is_not_wanted_may_have_any_name(tmp_path, store, format):
    path = tmp_path / f"list.{format}"
    record = {"url": "no link", "caption": "short", "link": "http://h/0", "long": "a caption"}
    if format == "csv":
        path.write_text(",".join(record) + "\n" + ",".join(record.values()))
    else:
        path.write_text(json.dumps([record] if format == "json" else record))
    made = source(store, url_list=str(path), url_col="link", caption_col="long")
    assert rows_of(made) == [("http://h/0", "a caption")]
    with pytest.raises(SettingError, match="url_col, caption_col: all are column link"):
        source(store, url_list=str(path), url_col="link", caption_col="link").shards()


def faults_of(made: Urls) -> list[str]:
    place = made._place()
    return [row.fault for s in made.shards() for row in url_lists.read(*place, s.spec[0])]


def test_text_in_another_encoding_is_named_or_a_reject_and_never_holes(tmp_path, store):
    path = tmp_path / "list.csv"
    path.write_bytes("url,caption\nhttp://h/0,café\nhttp://h/1,tea\n".encode("latin-1"))
    made = source(store, url_list=str(path))
    assert rows_of(made) == [(None, None), ("http://h/1", "tea")]
    (reject, _) = made.fetch(made.shards()[0])
    assert isinstance(reject, Reject)
    assert reject.reason == "malformed-row"
    assert reject.detail.startswith("line 2: caption: no text in the file's encoding: byte 0xe9")
    assert "set encoding, e.g. cp1252" in reject.detail
    named = source(store, url_list=str(path), encoding="cp1252")
    assert rows_of(named) == [("http://h/0", "café"), ("http://h/1", "tea")]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"):
        path.write_bytes("url,caption\nhttp://h/0,café 猫\n".encode(encoding))
        assert rows_of(source(store, url_list=str(path))) == [("http://h/0", "café 猫")]


STRAY = [
    "url{0}caption",
    "u://0{0}plain",
    'u://1{0}"begins with a quote',
    'u://2{0}a 5" screen',
    'u://3{0}"The end" he said',
    'u://4{0}a screen of 5"',
    'u://5{0}"an unclosed one',
    'u://6{0}"wholly quoted, ""and"" so on"',
    "u://7{0}one{0}too many",
    "u://8",
    "u://9{0}last",
]


@pytest.mark.parametrize("comma", [",", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_stray_quote_swallows_no_row(tmp_path, store, comma, end):
    """A row is read, or is a reject with its line: none gets another one's caption."""
    path = tmp_path / ("list.csv" if comma == "," else "list.tsv")
    path.write_bytes(end.join(line.format(comma) for line in STRAY).encode())
    made = source(store, url_list=str(path))
    found, faults = rows_of(made), faults_of(made)
    assert len(found) == len(STRAY) - 1
    good = {int(url[4:]): caption for url, caption in found if url}
    expected = {0: "plain", 2: 'a 5" screen', 4: 'a screen of 5"', 9: "last"}
    expected[6] = 'wholly quoted, "and" so on'
    if comma == "\t":  # a quote is a letter there
        expected |= {1: '"begins with a quote', 3: '"The end" he said', 5: '"an unclosed one'}
    assert good == expected
    assert [at for at, fault in enumerate(faults) if fault] == [
        at for at in range(10) if at not in expected
    ]
    assert faults[7] == "line 9: 3 fields, the header has 2"
    assert faults[8] == "line 10: 1 fields, the header has 2"
    assert all(f.startswith(f"line {at + 2}: ") for at, f in enumerate(faults) if f)


def test_a_caption_of_several_lines_is_none_of_the_rows(tmp_path, store):
    """By the format it may be one, and by what is in it it may be rows."""
    path = tmp_path / "list.csv"
    path.write_text('url,caption\nu://0,"two\nlines, and a comma"\nu://1,b\n')
    assert rows_of(source(store, url_list=str(path))) == [
        ("u://0", "two\nlines, and a comma"),
        ("u://1", "b"),
    ]
    path.write_text('caption,url\n"opens,u://0\nb,u://1\ncloses",u://2\nd,u://3\n')
    made = source(store, url_list=str(path))
    assert [url for url, _ in rows_of(made)] == [None, "u://1", "u://2", "u://3"]
    path = tmp_path / "list.tsv"
    path.write_text('url\tcaption\nu://0\t"two\nlines"\nu://1\t"opens\nu://2\tcloses"\n')
    assert rows_of(source(store, url_list=str(path))) == [
        ("u://0", "two\nlines"),
        ("u://1", '"opens'),
        ("u://2", 'closes"'),
    ]


def test_malformed_rows_are_counted_rejects_through_the_stage(tmp_path, store, web, capsys):
    web.add("/0.jpg", photo(0))
    path = tmp_path / "list.jsonl"
    good = json.dumps({"url": web.url + "/0.jpg", "caption": "zero"})
    path.write_text(f'{good}\n{{"url": "http://h/1?sig=s3cr3t", \n[1]\n')
    made = source(store, url_list=str(path))
    assert run(store, made) == 1
    told = capsys.readouterr().err
    assert "2 of 3 rows are malformed and become rejects; the first: line 2: no JSON" in told
    commit = read_commit(store, IMAGES, "00000")
    assert commit is not None
    assert (commit.samples, commit.rejects) == (1, {"malformed-row": 2})
    assert b"s3cr3t" not in b"".join(tree(Path(store.root)).values())


@pytest.mark.parametrize("comma", [",", "\t"])
def test_well_formed_tables_are_read_as_img2dataset_reads_them(tmp_path, store, comma):
    """Its reader, from its own file: the package takes seconds to import."""
    texts = ["plain", 'say ""hi""', "a, b", "007x", "", "a\tb", "ünï", "ends with ''", "x" * 9000]
    rows = [f'http://h/{n}{comma}"{text}"' for n, text in enumerate(texts)]
    rows += [f'http://h/{len(rows)}{comma}bare 5" text', ""]
    format = "csv" if comma == "," else "tsv"
    path = tmp_path / f"list.{format}"
    path.write_text("\n".join([f"url{comma}caption", *rows]))
    package = importlib.util.find_spec("img2dataset")
    assert package is not None
    assert package.submodule_search_locations
    module = runpy.run_path(str(Path(package.submodule_search_locations[0], "reader.py")))
    reader = module["Reader"](
        str(path), format, "url", "caption", None, None, None, 10_000, set(), str(tmp_path)
    )
    ((_, feather),) = reader
    with pa.OSFile(feather) as file:
        theirs = pa.ipc.open_file(file).read_all().to_pylist()
    ours = rows_of(source(store, url_list=str(path)))
    assert ours == [(row["url"], row["caption"]) for row in theirs]


def test_a_list_that_an_older_version_has_read_is_read_again_and_stays_what_it_was(tmp_path, store):
    path = csv_of(tmp_path / "list.csv", ROWS)
    shards = source(store, url_list=path).shards()
    (record,) = (n for n in store.names(LISTS) if n.endswith(".json"))
    kept = store.read_json(f"{LISTS}/{record}")
    for file in kept["files"]:
        del file["reader"]
    store.write_json(f"{LISTS}/{record}", kept)
    assert source(store, url_list=path).shards() == shards
    assert store.read_json(f"{LISTS}/{record}")["files"][0]["reader"] == url_lists.READER


def test_columns_as_pandas_and_polars_write_them(tmp_path, store):
    """Dictionary-encoded, large and categorical strings; one value that is no UTF-8."""
    urls = [f"http://h/{n}" for n in range(4)]
    captions = ["a", "b", "a", "c"]
    path = tmp_path / "list.parquet"
    large = pa.array(urls, pa.large_string())
    pq.write_table(
        pa.table({"url": large, "caption": pa.array(captions).dictionary_encode()}), path
    )
    assert rows_of(source(store, url_list=str(path))) == list(zip(urls, captions, strict=True))
    bad = pa.array([b"a", b"caf\xe9", None, b"c"]).view(pa.string())
    pq.write_table(pa.table({"url": urls, "caption": bad}), path)
    made = source(store, url_list=str(path))
    assert [caption for _, caption in rows_of(made)] == ["a", None, None, "c"]
    assert faults_of(made)[1] == "row 2: caption: no UTF-8"
    pq.write_table(pa.table({"url": urls, "caption": bad.dictionary_encode()}), path)
    assert faults_of(source(store, url_list=str(path)))[1] == "row 2: caption: no UTF-8"
    number = pa.array([1.5, float("nan")])
    pq.write_table(pa.table({"url": ["http://h/0", "http://h/1"], "caption": number}), path)
    assert [caption for _, caption in rows_of(source(store, url_list=str(path)))] == ["1.5", None]
    for kind in (pa.binary(3), pa.binary_view()):
        three = pa.array([b"one", b"\xfftw"], kind)
        pq.write_table(pa.table({"url": ["http://h/0", "http://h/1"], "caption": three}), path)
        made = source(store, url_list=str(path))
        assert [caption for _, caption in rows_of(made)] == ["one", None]
        assert faults_of(made)[1] == "row 2: caption: no UTF-8"


def test_a_folder_of_lists_is_read_in_order_of_name(tmp_path, store):
    folder = tmp_path / "lists"
    folder.mkdir()
    csv_of(folder / "b.csv", ROWS[4:])
    csv_of(folder / "a.csv", ROWS[:4])
    (folder / "_SUCCESS").touch()
    (folder / "a.csv.parquet").mkdir()
    (folder / "aa.csv").mkdir()
    made = source(store, url_list=str(folder), number_sample_per_shard=3)
    assert rows_of(made) == ROWS
    assert [s.spec[1] for s in made.shards()] == [3, 1, 3]  # each file begins a shard
    (folder / "c.tsv").write_text("url\tcaption\n")
    with pytest.raises(SettingError, match=r"2 formats; say which: input_format=csv\|tsv"):
        source(store, url_list=str(folder)).shards()
    assert source(store, url_list=str(folder), input_format="csv").shards()
    with pytest.raises(SettingError, match=r"no file named \*\.parquet"):
        source(store, url_list=str(folder), input_format="parquet").shards()


def test_planning_again_reads_no_list(tmp_path, store, monkeypatch):
    path = csv_of(tmp_path / "list.csv", ROWS)
    first = source(store, url_list=path).shards()
    monkeypatch.setattr(url_table, "_tables", lambda *_: pytest.fail("read again"))
    assert source(store, url_list=path).shards() == first
    assert source(store, url_list=path, retries=9, robots=False).shards() == first


def test_rows_that_are_appended_leave_earlier_shards_as_they_are(tmp_path, store):
    path = tmp_path / "list.csv"
    before = source(store, url_list=csv_of(path, ROWS), number_sample_per_shard=3).shards()
    more = [*ROWS, ("http://h/8.jpg", "one more")]
    after = source(store, url_list=csv_of(path, more), number_sample_per_shard=3).shards()
    assert after[:2] == before[:2]
    assert (before[2].spec[1], after[2].spec[1]) == (1, 2)


def test_only_files_that_changed_are_read_again(tmp_path, store, monkeypatch):
    folder = tmp_path / "lists"
    folder.mkdir()
    csv_of(folder / "a.csv", ROWS[:4])
    source(store, url_list=str(folder)).shards()
    read = []
    real = url_table._tables

    def noted(path, *rest):
        read.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(url_table, "_tables", noted)
    csv_of(folder / "b.csv", ROWS[4:])
    assert rows_of(source(store, url_list=str(folder))) == ROWS
    assert read == ["b.csv"]


def test_reading_that_was_interrupted_goes_on(tmp_path, store, monkeypatch, capsys):
    folder = tmp_path / "lists"
    folder.mkdir()
    csv_of(folder / "a.csv", ROWS[:4])
    csv_of(folder / "b.csv", ROWS[4:])
    real = url_table._tables

    def killed(path, *rest):
        if path.name == "b.csv":
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(url_table, "_tables", killed)
    with pytest.raises(KeyboardInterrupt):
        source(store, url_list=str(folder)).shards()
    monkeypatch.setattr(url_table, "_tables", real)
    capsys.readouterr()
    assert rows_of(source(store, url_list=str(folder))) == ROWS
    assert capsys.readouterr().err == f"reading list 2 of 2: {folder}/b.csv\n"


def test_a_list_on_the_web_leaves_no_secret(tmp_path, store, web):
    web.add("/list.csv", Path(csv_of(tmp_path / "list.csv", ROWS)).read_bytes())
    url = f"{web.url}/list.csv?token=s3cr3t"
    made = source(store, url_list=url)
    assert rows_of(made) == ROWS
    assert source(store, url_list=url.replace("s3cr3t", "another")).shards() == made.shards()
    assert b"s3cr3t" not in b"".join(tree(Path(store.root)).values())
    assert "s3cr3t" not in str(made.shards()) + str(made.decisive())
    for bad in (f"{web.url}/gone.csv?token=s3cr3t", "http://nowhere.invalid/list.csv?token=s3cr3t"):
        with pytest.raises(SettingError) as error:
            source(store, url_list=bad).shards()
        assert "s3cr3t" not in str(error.value)
        assert "url_list=http://" in str(error.value)


def test_a_list_in_another_file_system(tmp_path, store):
    with fsspec.open(f"memory://{tmp_path.name}/list.csv", "w") as file:
        file.write(Path(csv_of(tmp_path / "list.csv", ROWS)).read_text())  # pyright: ignore
    assert rows_of(source(store, url_list=f"memory://{tmp_path.name}/list.csv")) == ROWS
    assert rows_of(source(store, url_list=f"memory://{tmp_path.name}")) == ROWS


def test_rows_of_other_types_become_text(tmp_path, store):
    path = tmp_path / "list.csv"
    path.write_text("url,caption\nhttp://h/0.jpg,17\nhttp://h/1.jpg,18\n")
    assert rows_of(source(store, url_list=str(path))) == [
        ("http://h/0.jpg", "17"),
        ("http://h/1.jpg", "18"),
    ]
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": ["http://h/0"], "caption": [["two", "captions"]]}), path)
    with pytest.raises(SettingError, match="column caption holds list<"):
        source(store, url_list=str(path)).shards()


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_a_column_that_is_not_there_is_named(tmp_path, store, format):
    records = [{"link": "http://h/0", "caption": "x"}]
    path = tmp_path / f"list.{format}"
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif format == "jsonl":
        path.write_text(json.dumps(records[0]))
    else:
        path.write_text("link,caption\nhttp://h/0,x\n")
    with pytest.raises(SettingError, match=r"url_col=url: .*there are: link, caption"):
        source(store, url_list=str(path)).shards()
    with pytest.raises(SettingError, match=r'caption_col=captoin: .*did you mean "caption"'):
        source(store, url_list=str(path), url_col="link", caption_col="captoin").shards()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("list.csv", b"", "no such column"),
        ("list.parquet", b"PAR1 no", "url_list=.*not a table in format parquet"),
        ("list.json", b"{", "url_list="),
        ("list.json", b"[1, 2]", "a row is no JSON object"),
        ("list.csv", b'url,"caption\n' + b"http://h/0,x\n" * 2000, "csv: its header, line 1: "),
        ("list.csv", b'"url,caption\nhttp://h/0,"x"\n', "csv: its header, line 1: "),
        ("list.tsv", b'"url\tcaption\n' + b"http://h/0\tx\n" * 9, "tsv: its header, line 1: "),
        ("list.csv", "url,caption é\nhttp://h/0,x\n".encode("latin-1"), "its header is no UTF-8"),
        ("list.csv", b"url,caption\n", "no row in it that is wanted"),
        ("list.csv.gz", b"url,caption\n", "url_list="),
        ("list.dat", b"url,caption\n", "set input_format, one of"),
        ("gone/list.csv", None, "no such file"),
    ],
)
def test_a_list_that_cannot_be_read_is_one_line(tmp_path, store, name, data, message):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SettingError, match=message) as error:
        source(store, url_list=str(path)).shards()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("header", ["\n\r\nurl,caption", '"url",caption,"in\nEnglish"'])
def test_a_header_after_blank_lines_or_of_several(tmp_path, store, header):
    path = tmp_path / "list.csv"
    path.write_text(f"{header}\nhttp://h/0,x{',y' * header.count('in')}\n")
    assert rows_of(source(store, url_list=str(path))) == [("http://h/0", "x")]


def test_rows_that_are_gone_or_others_are_not_used(tmp_path, store):
    made = source(store, url_list=csv_of(tmp_path / "list.csv", ROWS))
    (shard,) = made.shards()
    path = Path(store.url(f"{LISTS}/{shard.spec[0]}.parquet"))
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(BrokenShard, match="holds other rows"):
        list(made.fetch(shard))
    path.unlink()
    with pytest.raises(BrokenShard, match="is gone; run again"):
        list(made.fetch(shard))
    again = source(store, url_list=made.url_list)
    assert again.shards() == [shard]
    assert len(list(again.fetch(shard))) == len(ROWS)


# ---- pictures


def run(store: Store, made: Urls, **more) -> int:
    return run_here(Download("urls", made, **more), store)


def table_of(store: Store, shard: str = "00000") -> list[dict]:
    commit = read_commit(store, IMAGES, shard)
    assert commit is not None
    return from_parquet(store.read(f"{IMAGES}/{commit.file('.parquet')}")).to_pylist()


def test_a_list_becomes_tars_as_img2dataset_lays_them_out(tmp_path, store, web):
    signed = web.add("/0.jpg", photo(0)) + "?sig=a%2Fb"
    rows = [(signed, "zero"), (web.url + "/gone.jpg", "gone"), ("file:///etc/passwd", "local")]
    rows += [("", "no link"), (web.add("/4.jpg", photo(4)), ""), (web.url + "/0.jpg", "again")]
    rows += [(web.add("/6.jpg", photo(6, 100, 100)), "small"), (web.add("/7.jpg", photo(7)), "七")]
    web.add("/8.jpg", photo(8), X_Robots_Tag="noai")
    rows += [(web.url + "/8.jpg", "opted out"), (web.route("/9", servers.page()), "a page")]
    made = source(store, url_list=csv_of(tmp_path / "list.csv", rows), number_sample_per_shard=10)
    assert run(store, made) == 1
    table = table_of(store)
    assert {row["key"]: row["status"] for row in table} == {
        "000000000": "success",
        "000000001": "failed_to_download",
        "000000002": "refused",
        "000000003": "refused",
        "000000004": "no-caption",
        "000000005": "duplicate",
        "000000006": "too-small",
        "000000007": "success",
        "000000008": "opted-out",
        "000000009": "undecodable",
    }
    assert (table[0]["url"], table[0]["caption"]) == (signed, "zero")
    commit = read_commit(store, IMAGES, "00000")
    assert commit is not None
    tar = dict(read_samples(store.read(f"{IMAGES}/{commit.file('.tar')}")))
    assert list(tar) == ["000000000", "000000007"]
    assert tar["000000007"]["txt"].decode() == "七"
    assert tar["000000007"]["jpg"] == photo(7)
    stats = store.read_json(f"{IMAGES}/{commit.file('.tar').removesuffix('.tar')}_stats.json")
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (10, 2, 1)
    # Nothing is left to do, nor after a change of what decides no byte.
    assert run(store, source(store, url_list=made.url_list, number_sample_per_shard=10)) == 0
    patient = source(store, url_list=made.url_list, number_sample_per_shard=10, timeout=9)
    assert not plan(Download("urls", patient), Catalog(store)).stale
    rude = source(store, url_list=made.url_list, number_sample_per_shard=10, robots=False)
    assert plan(Download("urls", rude), Catalog(store)).stale


def test_what_stands_around_a_link_is_no_part_of_it(tmp_path, store, web):
    link = web.add("/0.jpg", photo(0))
    path = tmp_path / "list.jsonl"
    rows = [f"\ufeff{link}", f"\u00a0 {link}\u200b"]
    path.write_text("".join(json.dumps({"url": row, "caption": "x"}) + "\n" for row in rows))
    made = source(store, url_list=str(path))
    found = [item for item in made.fetch(made.shards()[0]) if isinstance(item, RawImage)]
    assert [(item.ref.url, item.data) for item in found] == [(link, photo(0))] * 2


def test_keys_are_those_of_img2dataset(tmp_path, store):
    made = source(store, url_list=csv_of(tmp_path / "l.csv", [("", str(i)) for i in range(12)]))
    assert made.number_sample_per_shard == 10_000
    few = source(store, url_list=made.url_list, number_sample_per_shard=10)
    keys = [item.key for shard in few.shards() for item in few.fetch(shard)]  # pyright: ignore
    assert keys[9:] == ["000000009", "000010000", "000010001"]


def test_two_runs_make_the_same_bytes(tmp_path, web):
    rows = [(web.add(f"/{i}.jpg", photo(i)), f"number {i}") for i in range(6)]
    rows.insert(3, (web.url + "/gone", "gone"))
    path = csv_of(tmp_path / "list.csv", rows)
    trees = []
    for name, threads in (("one", 1), ("two", 8)):
        store = Store(tmp_path / name)
        run(store, source(store, url_list=path, number_sample_per_shard=4, thread_count=threads))
        trees.append(tree(tmp_path / name))
    assert trees[0] == trees[1]


def test_a_worker_on_another_machine_reads_its_shard_alone(tmp_path, store, web):
    rows = [(web.add(f"/{i}.jpg", photo(i)), f"number {i}") for i in range(4)]
    path = csv_of(tmp_path / "list.csv", rows)
    stage = Download("urls", source(store, url_list=path, number_sample_per_shard=2))
    jobs = list(stage.plan(Catalog(store)))
    Path(path).unlink()
    there = pickle.loads(pickle.dumps(stage))
    there.open(Store(store.root))(pickle.loads(pickle.dumps(jobs[1])))
    assert [row["caption"] for row in table_of(store, "00001")] == ["number 2", "number 3"]
    assert web.count("/0.jpg") == 0


def test_only_some_keys_are_fetched(tmp_path, store, web):
    rows = [(web.add(f"/{i}.jpg", photo(i)), f"number {i}") for i in range(4)]
    rows.append(("", "no link"))
    made = source(store, url_list=csv_of(tmp_path / "list.csv", rows))
    (shard,) = made.shards()
    found = list(made.fetch(shard, frozenset({"000000002", "000000004"})))
    assert isinstance(found[0], RawImage)
    assert (found[0].ref.key, found[0].data) == ("000000002", photo(2))
    assert isinstance(found[1], Reject)
    assert [hit.path for hit in web.hits] == ["/robots.txt", "/2.jpg"]


def test_what_failed_is_fetched_again_on_demand(tmp_path, store, web):
    rows = [(web.add("/0.jpg", photo(0)), "there"), (web.url + "/1.jpg", "late")]
    made = source(store, url_list=csv_of(tmp_path / "list.csv", rows))
    run(store, made)
    assert [row["status"] for row in table_of(store)] == ["success", "failed_to_download"]
    web.add("/1.jpg", photo(1))
    stage = Download("urls", made, retry_failed=True)
    todo = list(stage.plan(Catalog(store)))
    stage.open(store)(todo[0])
    assert [row["status"] for row in table_of(store)] == ["success", "success"]
    assert web.count("/0.jpg") == 1


@pytest.mark.parametrize("kind", ["md5", "sha256", "sha512"])
def test_pictures_with_another_hash_are_left_out(tmp_path, store, web, kind):
    digest = hashlib.new(kind, photo(0)).hexdigest()
    rows = [(web.add("/0.jpg", photo(0)), digest.upper()), (web.add("/1.jpg", photo(1)), digest)]
    rows.append((web.url + "/0.jpg", ""))
    path = csv_of(tmp_path / "list.csv", rows, "url,sum")
    made = source(store, url_list=path, caption_col="", verify_hash=f"sum,{kind}")
    good, other, none = made.fetch(made.shards()[0])
    assert isinstance(good, RawImage)
    assert (other.reason, none.reason) == ("hash-mismatch", "hash-mismatch")  # pyright: ignore
    assert other.detail.startswith(f"{kind} {hashlib.new(kind, photo(1)).hexdigest()[:12]}")  # pyright: ignore
    assert none.detail == "no hash in this row"  # pyright: ignore


# ---- settings


def test_the_yaml_of_the_source_and_flags(tmp_path):
    config = load_config("urls", Path("yamls/data/urls.yaml"), {})
    with pytest.raises(SettingError, match="url_list"):
        build_stage("download", config)
    overrides = {"download.url_list": "l.csv", "download.host_rate": "0"}
    overrides["download.disallowed_header_directives"] = ""
    stage = build_stage("download", load_config("urls", None, overrides))
    assert isinstance(stage, Download)
    assert isinstance(stage.settings, Urls)
    assert stage.settings.host_rate == 0
    assert stage.settings.disallowed_header_directives == ()
    defaults = Urls(url_list="l.csv").model_dump()
    for name, value in config.download.items():
        value = tuple(value) if isinstance(value, list) else value
        assert defaults[name] == value, name
    for bad in ({"number_sample_per_shard": 10_001}, {"verify_hash": "a,crc32"}, {"retires": 1}):
        more = {f"download.{name}": value for name, value in bad.items()}
        config = load_config("urls", None, {**overrides, **more})
        with pytest.raises(SettingError, match=next(iter(bad))):
            build_stage("download", config)
    config = load_config("urls", None, {**overrides, "download.verify_hash": "md5"})
    with pytest.raises(SettingError, match=r"verify_hash='md5': .*write COLUMN,KIND"):
        build_stage("download", config)


def test_a_full_scratch_disk_is_named(tmp_path, store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(url_table, "scratch_folder", full)
    with fsspec.open(f"memory://{tmp_path.name}/list.csv", "w") as file:
        file.write("url,caption")  # pyright: ignore
    with pytest.raises(SettingError, match=r"no space left to read url_list=.*MICRODIT_SCRATCH"):
        source(store, url_list=f"memory://{tmp_path.name}/list.csv").shards()


@pytest.mark.slow
def test_the_command_downloads_a_list(tmp_path, web):
    rows = [(web.add(f"/{i}.jpg", photo(i)), f"number {i}") for i in range(6)]
    path = csv_of(tmp_path / "list.csv", rows)
    command = [
        str(Path(sys.executable).with_name("pipeline")),
        "run",
        "download",
        "--source",
        "urls",
    ]
    command += ["--root", str(tmp_path / "root"), "--workers", "2"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "url_list" in refused.stderr
    for setting in (f"url_list={path}", "number_sample_per_shard=3", "allow_private_hosts=true"):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    store = Store(tmp_path / "root")
    assert [row["caption"] for n in range(2) for row in table_of(store, f"0000{n}")] == [
        caption for _, caption in rows
    ]
    assert len(web.hits) == 6 + web.count("/robots.txt")


@pytest.mark.slow
def test_img2dataset_makes_the_same_of_the_same_list(tmp_path, store, web):
    """Its command is the contract: names of files, keys, members, columns, counts."""
    rows = [(web.add(f"/{i}.jpg", photo(i)), f"number {i}") for i in range(4)]
    rows.insert(2, (web.url + "/gone.jpg", "gone"))
    rows.append((web.add("/opt-out.jpg", photo(9), X_Robots_Tag="noai"), "opted out"))
    path = csv_of(tmp_path / "list.csv", rows)
    command = [str(Path(sys.executable).with_name("img2dataset")), "--url_list", path]
    command += ["--input_format", "csv", "--caption_col", "caption", "--resize_mode", "no"]
    command += ["--output_format", "webdataset", "--output_folder", str(tmp_path / "theirs")]
    command += ["--processes_count", "1", "--compute_hash", "sha256"]
    env = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    subprocess.run(command, env=env, check=True, capture_output=True)
    run(store, source(store, url_list=path))
    commit = read_commit(store, IMAGES, "00000")
    assert commit is not None
    theirs = tmp_path / "theirs"
    their_rows = {row["key"]: row for row in pq.read_table(theirs / "00000.parquet").to_pylist()}
    our_rows = {row["key"]: row for row in table_of(store)}
    assert set(our_rows) == set(their_rows)
    for key, row in their_rows.items():
        assert (our_rows[key]["status"] == "success") == (row["status"] == "success")
        assert set(row) <= set(our_rows[key])
        if row["status"] == "success":
            same = ("url", "caption", "width", "height", "original_width", "original_height")
            assert [our_rows[key][name] for name in same] == [row[name] for name in same]
    tars = [
        {key: set(fields) for key, fields in read_samples(data)}
        for data in (
            (theirs / "00000.tar").read_bytes(),
            store.read(f"{IMAGES}/{commit.file('.tar')}"),
        )
    ]
    assert tars[0] == tars[1]
    stats = json.loads((theirs / "00000_stats.json").read_text())
    ours = store.read_json(f"{IMAGES}/{commit.file('.tar').removesuffix('.tar')}_stats.json")
    assert set(stats) == set(ours)
    assert (stats["count"], stats["successes"]) == (ours["count"], ours["successes"])


# ---- cifar-captions


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A cat on a mat", True),
        ("CATS!", True),
        ("two (birds)", True),
        ("cat", True),
        ("category", False),
        ("concatenate", False),
        ("hot-dog stand", True),
        ("dog_01", False),
        ("relationship advice", False),
        ("the ship's crew", True),
        ("trucks", True),
        ("horséback", False),
        ("a car", False),
        ("", False),
    ],
)
def test_a_class_is_a_word_of_its_own(text, found):
    import pyarrow.compute as pc

    matches = pc.match_substring_regex(pa.array([text]), pattern(CLASSES))  # pyright: ignore
    assert matches.to_pylist() == [found]


def test_plurals():
    words = pattern(("fox", "fly", "boat", "day"))
    assert all(f"|{word}" in f"|{words}" for word in ("foxes", "flies", "boats", "days"))


def test_links_of_coyo_that_name_a_class(tmp_path, store):
    folder = tmp_path / "coyo"
    folder.mkdir()
    texts = ["a cat", "a house", "dogs", "tiny frog", None, "bird"]
    for part in range(2):
        pq.write_table(
            pa.table(
                {
                    "id": list(range(6)),
                    "url": [f"http://h/{part}/{i}" for i in range(6)],
                    "text": pa.array(texts, pa.string()),
                    "width": [300, 300, 300, 100, 300, None],
                    "height": [300, 300, 256, 300, 300, 300],
                    "clip_similarity_vitb32": [0.1] * 6,
                }
            ),
            folder / f"part-0000{part}-17da-c000.snappy.parquet",
        )
    made = CifarCaptions(url_list=str(folder), number_sample_per_shard=2)
    made.attach(store, LISTS)
    assert rows_of(made) == [
        *(("http://h/0/0", "a cat"), ("http://h/0/2", "dogs"), ("http://h/0/5", "bird")),
        *(("http://h/1/0", "a cat"), ("http://h/1/2", "dogs"), ("http://h/1/5", "bird")),
    ]
    odd = tmp_path / "odd.parquet"
    nothing = pa.nulls(1, pa.null())
    pq.write_table(
        pa.table({"url": ["h"], "text": ["cat"], "width": [300.0], "height": nothing}), odd
    )
    other = CifarCaptions(url_list=str(odd))
    other.attach(store, LISTS)
    assert rows_of(other) == [("h", "cat")]
    other = CifarCaptions(
        url_list=csv_of(odd.with_suffix(".csv"), [("h,wide,3", "cat")], "url,width,height,text")
    )
    other.attach(store, LISTS)
    with pytest.raises(SettingError, match=r"url_list=.*Failed to parse string: 'wide'"):
        other.shards()
    other = CifarCaptions(url_list=str(folder), classes=("house",), min_listed_size=0)
    other.attach(store, LISTS)
    assert [caption for _, caption in rows_of(other)] == ["a house"] * 2
    config = load_config("cifar-captions", Path("yamls/data/cifar-captions.yaml"), {})
    stage = build_stage("download", config)
    assert isinstance(stage, Download)
    assert stage.settings == CifarCaptions()


def test_shards_are_filled_over_what_is_left_out(tmp_path, store):
    """A shard holds as many rows as asked for, however few of the list's are wanted."""
    rows = [(f"http://h/{i}", "a dog" if i % 3 else "a house") for i in range(30)]
    path = csv_of(tmp_path / "list.csv", rows, "url,text")
    made = CifarCaptions(url_list=path, number_sample_per_shard=8, min_listed_size=0)
    made.attach(store, LISTS)
    assert [s.spec[1] for s in made.shards()] == [8, 8, 4]
    assert [url for url, _ in rows_of(made)] == [url for url, text in rows if text == "a dog"]

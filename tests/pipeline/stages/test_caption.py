"""The caption stage with a small LLaVA: what it writes, what it counts, what it refuses."""

from __future__ import annotations

import io
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from captioning import Caption
from pipeline.cli import main
from pipeline.commands.checks import Problem, Task, check
from pipeline.commands.summary import summarise
from pipeline.commands.verify import repair
from pipeline.core import layout
from pipeline.core.catalog import Catalog
from pipeline.core.commits import Commit, read_commits
from pipeline.core.errors import SettingError
from pipeline.core.samples import ImageRef, ImageSample, InputShard
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.engine.plan import Choice, plan
from pipeline.engine.report import Report
from pipeline.stages.caption import CaptionStage
from pipeline.stages.caption_text import Refused, finish, parse_steps, words_up_to
from pipeline.stages.captions import Mix, chosen_captions, one_of, upstream
from pipeline.stages.images import write_images
from tests.captioning.helpers.openai_server import Server
from tests.pipeline.helpers.roots import pictures, run_here, tree

IMAGES = "openmoji/images"
PIPELINE = str(Path(sys.executable).with_name("pipeline"))
SHORT: dict[str, Any] = {"max_tokens": 12, "batch_size": 4}


def stage(llava: Path, clean: str = "", **settings: Any) -> CaptionStage:
    return CaptionStage("openmoji", str(llava), 0.9, {**SHORT, **settings}, clean)


def rows_of(store: Store, group: str, shard: str = "00000") -> list[dict[str, Any]]:
    commit = read_commits(store, group)[shard]
    return from_parquet(store.read(f"{group}/{commit.file('.parquet')}")).to_pylist()


def problems(store: Store, group: str) -> list[str]:
    source, _, name = group.partition("/")
    tasks = [
        Task(store.root, source, name, shard, None, frozenset())
        for shard in read_commits(store, group)
    ]
    return [str(problem) for task in tasks for problem in check(task).problems]


def test_captions_stand_beside_the_pictures_which_are_not_touched(downloaded, llava):
    before = tree(Path(downloaded.root))
    made = stage(llava)
    (group,) = made.groups()
    assert run_here(made, downloaded) == 2
    after = tree(Path(downloaded.root))
    assert {name: after[name] for name in before} == before
    rows = rows_of(downloaded, group)
    assert [row["key"] for row in rows] == [p.ref.key for p in pictures()]
    for row in rows:
        assert row["captioner"] == str(llava)
        assert row["revision"] == made.captioner.revision
        assert row["prompt"].startswith("Describe this picture in one detailed paragraph")
        assert 0 < row["tokens"] <= 12
        assert row["finish_reason"] in ("stop", "length")
        assert (row["number"], row["best_effort"]) == (0, False)
    counters = read_commits(downloaded, group)["00000"].counters
    assert counters["captions"] == len(rows)
    assert counters["tokens"] == sum(row["tokens"] for row in rows)
    assert counters["truncated"] == sum(row["finish_reason"] == "length" for row in rows)
    assert problems(downloaded, group) == []
    assert run_here(stage(llava), downloaded) == 0


def test_the_same_shard_gives_the_same_bytes_in_any_batch_at_a_temperature(downloaded, llava):
    drawn = {"temperature": 0.8, "num_captions": 2}
    made = stage(llava, **drawn)
    (group,) = made.groups()
    run_here(made, downloaded)
    first = read_commits(downloaded, group)["00000"]
    run_here(stage(llava, **drawn, batch_size=3), downloaded, Choice(stale=True))
    again = read_commits(downloaded, group)["00000"]
    assert first.fingerprint != again.fingerprint
    assert first.content() == again.content()


def test_prompts_and_steps_of_one_captioner_have_groups_of_their_own(downloaded, llava):
    kinds = [
        stage(llava),
        stage(llava, prompt="short"),
        stage(llava, prompt="long,short"),
        stage(llava, prompt="What is it?"),
        stage(llava, temperature=0.5),
        stage(llava, "habits,lower"),
    ]
    groups = [group for kind in kinds for group in kind.groups()]
    assert len(set(groups)) == len(groups)
    assert groups[-1].endswith(".habits+lower")
    for kind in kinds[:2]:
        run_here(kind, downloaded)
    assert len({str(rows_of(downloaded, group)) for group in groups[:2]}) == 2
    assert not plan(kinds[0], Catalog(downloaded)).stale


def test_what_decides_a_text_makes_its_shards_stale_and_says_so(downloaded, llava):
    run_here(stage(llava), downloaded)
    changed = plan(stage(llava, max_tokens=9), Catalog(downloaded))
    assert changed.stale == {"max_tokens: 12 -> 9": 2}
    assert not plan(stage(llava, seed=3), Catalog(downloaded)).stale  # greedy: no noise to seed


def test_of_several_captions_training_takes_one_by_seed_and_key(downloaded, llava):
    made = stage(llava, prompt="long,short")
    (group,) = made.groups()
    run_here(made, downloaded)
    rows = rows_of(downloaded, group)
    assert [row["number"] for row in rows] == [0, 1] * (len(rows) // 2)
    assert read_commits(downloaded, group)["00000"].samples == len(rows) // 2
    assert problems(downloaded, group) == []
    mix = Mix.parse(made.label)
    images = read_commits(downloaded, IMAGES)["00000"]
    heads = Catalog(downloaded).heads(IMAGES)
    contents = upstream(Catalog(downloaded), "openmoji", mix, heads)["00000"]
    by_key: dict[str, list[str]] = {}
    for row in rows:
        by_key.setdefault(row["key"], []).append(row["caption"])
    taken = [
        chosen_captions(downloaded, "openmoji", mix, seed, images, contents) for seed in range(8)
    ]
    for chosen in taken:
        assert all(chosen[key] in captions for key, captions in by_key.items())
    assert {text for chosen in taken for text in chosen.values()} == {r["caption"] for r in rows}


def test_captions_that_are_not_there_are_one_line_with_those_that_are(downloaded):
    run_here(CaptionStage("openmoji", "colour"), downloaded)
    catalog = Catalog(downloaded)
    heads = catalog.heads(IMAGES)
    with pytest.raises(SettingError, match=r"'colour.lower' has captioned nothing.* by colour$"):
        upstream(catalog, "openmoji", Mix.parse("alt:0.5,colour.lower:0.5"), heads)


def test_the_draw_is_even():
    drawn = Counter(one_of(["a", "b", "c"], 0, f"{n:09d}") for n in range(3000))
    assert all(900 < drawn[text] < 1100 for text in "abc")
    assert one_of(["a"], 0, "x") == "a"
    assert one_of([], 0, "x") == ""


def test_pictures_that_cannot_be_captioned_are_rejects(tmp_path, llava):
    store = Store(tmp_path)
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    tiny, line = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (1, 1), (200, 0, 0)).save(tiny, "PNG")
    Image.new("RGB", (3000, 2), (200, 0, 0)).save(line, "PNG")
    odd = {"huge": huge.getvalue(), "ruin": b"<html>not found</html>", "tiny": tiny.getvalue()}
    odd["wire"] = line.getvalue()
    samples = [
        ImageSample(ImageRef(key, "x:", "odd"), data, "png", 9, 9, 9, 9)
        for key, data in odd.items()
    ]
    write_images(store, IMAGES, InputShard("00000", "train"), {}, [*pictures(), *samples], 0.0)
    made = stage(llava)
    (group,) = made.groups()
    run_here(made, store)
    commit = read_commits(store, group)["00000"]
    assert commit.rejects == {"aspect-ratio": 1, "too-large": 1, "undecodable": 1}
    assert [row["key"] for row in rows_of(store, group)][-1] == "tiny"
    assert problems(store, group) == []


def test_repair_names_the_command_that_makes_the_same_captions(
    downloaded, llava, monkeypatch, capsys
):
    drawn = {"prompt": "What is it?", "temperature": 0.5, "num_captions": 2, "seed": 3}
    made = stage(llava, "habits,lower", **drawn)
    (group,) = made.groups()
    run_here(made, downloaded)
    source, _, name = group.partition("/")
    (line,) = repair(downloaded, [Problem(source, name, "00001", None, "is broken")])
    command = shlex.split(line.split("`")[1])
    assert command[:3] == ["pipeline", "run", "caption"]
    monkeypatch.setattr(sys, "argv", [*command, "--stale", "--dry-run"])
    with pytest.raises(SystemExit):
        main()
    assert "1 shards left, 1 done" in capsys.readouterr().out


def test_repair_names_what_decides_a_servers_captions(downloaded, llava, monkeypatch, capsys):
    with Server() as server:
        own = {"model": "tiny", "revision": "2", "tokenizer": str(llava), "prompt": "short"}
        made = CaptionStage("openmoji", "endpoint", settings={**own, "url": server.url})
        run_here(made, downloaded)
    source, _, name = made.groups()[0].partition("/")
    (line,) = repair(downloaded, [Problem(source, name, "00001", None, "is broken")])
    command = shlex.split(line.split("`")[1])
    monkeypatch.setattr(sys, "argv", [*command, "--stale", "--dry-run"])
    with pytest.raises(SystemExit):
        main()
    assert "1 shards left, 1 done" in capsys.readouterr().out


# What is kept of a text


def finished(*texts: str, steps: str = "") -> tuple[list[str] | Refused, Counter[str]]:
    counters: Counter[str] = Counter()
    captions = [Caption(text, "x", "1", finish_reason="length") for text in texts]
    found = finish(captions, parse_steps(steps), counters)
    return (found if isinstance(found, Refused) else [c.text for c in found]), counters


def test_a_text_is_one_line_whatever_is_in_it():
    assert finished("a\x00 red\n\nfox\x1b[0m \ud83d")[0] == ["a red fox [0m"]


def test_steps_are_done_in_their_order_however_they_are_given():
    text = "The image features a Red Fox, see https://a.example.com for more."
    assert finished(text)[0] == [text]
    assert finished(text, steps="habits")[0] == [text.replace("The image features a", "A")]
    assert finished(text, steps="lower,rules,habits")[0] == ["a red fox, see for more."]
    with pytest.raises(SettingError, match=r'clean=lowr: unknown; did you mean "lower"\?'):
        parse_steps("lowr")


def test_a_picture_of_whose_captions_none_is_left_is_refused():
    kept, counters = finished("", "  \n", "A fox.")
    assert kept == ["A fox."]
    assert counters == {"empty": 2, "truncated": 1}
    assert isinstance(finished("")[0], Refused)
    refused, counters = finished("I'm sorry, but I cannot help with that.", "")
    assert isinstance(refused, Refused)
    assert refused.reason == "refused"
    assert counters == {"empty": 1, "refusals": 1}


@pytest.mark.parametrize(
    ("words", "name"),
    [(1, "1-10"), (10, "1-10"), (11, "11-20"), (160, "81-160"), (161, "over 160")],
)
def test_lengths_have_a_place_in_the_histogram(words, name):
    assert words_up_to("w " * words) == f"words {name}"


# The page


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("small", [False, True])
def test_the_page_shows_pictures_with_captions_and_needs_no_other_file(
    tmp_path, monkeypatch, small
):
    store = Store(tmp_path)
    sample = pictures()[0]
    each = 3 if small else 10
    for number in range(9):
        some = [
            ImageSample(
                ImageRef(f"{number:05d}{i:04d}", "x:", "x"), sample.data, "png", 64, 64, 64, 64
            )
            for i in range(each)
        ]
        write_images(store, IMAGES, InputShard(f"{number:05d}", "train"), {}, some, 0.0)
    evil = "<script>alert(1)</script> & so on"
    monkeypatch.setattr("captioning.colour.describe", lambda image: evil)
    colour = CaptionStage("openmoji", "colour")
    run_here(colour, store)
    counters = Counter({"captions": 50, "tokens": 100, "words 1-10": 50, "truncated": 2})
    text = colour.page(store, counters, 10.0)
    page = Page(text)
    assert page.tags["figure"] == page.tags["img"] == 24
    assert page.tags["script"] == 0
    assert page.text.count(evil) == 24
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "50 captions (5.0/s), 100 tokens (10.0/s), 2 truncated" in page.text
    assert text == colour.page(store, counters, 10.0)


def test_a_picture_that_a_server_read_and_nobody_else_can_is_left_out_of_the_page(tmp_path):
    store = Store(tmp_path)
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(buffer, "PNG")
    data = buffer.getvalue()
    middle = len(data) // 2
    broken = data[:middle] + bytes(64) + data[middle + 64 :]  # its header and its end are sound
    odd = ImageSample(ImageRef("odd", "x:", "odd"), broken, "png", 64, 64, 64, 64)
    write_images(store, IMAGES, InputShard("00000", "train"), {}, [*pictures(), odd], 0.0)
    with Server() as server:
        own = {"url": server.url, "model": "tiny"}
        made = CaptionStage("openmoji", "endpoint", settings=own)
        run_here(made, store)
    assert "odd" in {row["key"] for row in rows_of(store, made.groups()[0])}
    page = Page(made.page(store, Counter(), 1.0))
    assert page.tags["figure"] == len(pictures())
    assert "not shown: odd: " in page.text


def test_a_runs_report_has_rates_and_counts_and_its_page_beside_it(downloaded, capsys):
    report = Report("caption", "openmoji", shards=2, samples=10, seconds=4.0)
    report.counters = Counter({"captions": 20, "tokens": 300, "words 1-10": 20, "refusals": 1})
    path = report.write(downloaded)
    record = downloaded.read_json(path)
    assert (record["captions_per_s"], record["tokens_per_s"]) == (5.0, 75.0)
    assert record["counters"]["refusals"] == 1
    downloaded.write(path.removesuffix(".json") + ".html", b"a page")
    assert "page" not in record  # its stage painted none
    summarise(report)
    assert "20 captions (5.0/s), 300 tokens (75.0/s)" in capsys.readouterr().out


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"promt": "short"}, r'caption.promt: no setting of .* did you mean "prompt"\?'),
        ({"temperature": "warm"}, "caption.temperature='warm'"),
        ({"batch_size": "many"}, "caption.batch_size='many'"),
        ({"num_captions": "2"}, "num_captions=2: at temperature 0"),
        ({"device": "tpu"}, "caption.device='tpu'"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(llava, settings, message):
    with pytest.raises(SettingError, match=message) as caught:
        stage(llava, **settings)
    assert "\n" not in str(caught.value)


def test_a_run_tells_where_its_time_went(downloaded):
    worker = CaptionStage("openmoji", "colour").open(downloaded)
    for job in worker.stage.plan(Catalog(downloaded)):
        worker(job)
    assert {"ms read", "ms look", "ms write"} <= worker.take_counters().keys()


def test_a_device_is_of_no_concern_to_a_captioner_without_a_model():
    assert CaptionStage("openmoji", "colour", settings={"device": "cuda"}).needs.gpus == 0


def test_a_worker_with_a_gpu_asks_for_it(llava):
    assert stage(llava, device="cuda").needs.gpus == 1


def test_what_is_wrong_with_a_model_is_known_before_a_worker_starts(downloaded, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(SettingError, match=r"config.json is missing"):
        plan(stage(tmp_path / "none"), Catalog(downloaded))


# Through the runner


def command(root: Path, llava: Path, *more: str) -> list[str]:
    own = ["--captioner", str(llava), "--prompt", "long,short", "--max-tokens", "12", *more]
    return [PIPELINE, "run", "caption", "--source", "openmoji", "--root", str(root), *own]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_and_rerun_run_leaves_the_same_bytes(tmp_path, llava):
    begin = tmp_path / "begin"
    download = [PIPELINE, "run", "download", "--source", "openmoji", "--root", str(begin)]
    sets = ["glyphs=avocado;rocket;fox", "size=64", "samples_per_shard=4"]
    subprocess.run([*download, *(a for s in sets for a in ("--set", s))], check=True)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for root in (whole, killed):
        shutil.copytree(begin, root)
    done = subprocess.run(
        command(whole, llava, "--workers", "2"), capture_output=True, text=True, check=True
    )
    assert "captions (" in done.stdout
    group = layout.captions_group("openmoji", f"{llava}.long.short")
    process = subprocess.Popen(
        command(killed, llava, "--workers", "1"), stdout=subprocess.PIPE, start_new_session=True
    )
    while process.poll() is None and not list(killed.glob(f"{group}/commits/*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    commits: dict[str, Commit] = read_commits(Store(whole), group)
    again = subprocess.run(command(killed, llava, "--workers", "1"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert tree(killed) == tree(whole)
    assert len(commits) > 2
    (page,) = (whole / "openmoji" / "runs" / "caption").glob("*.html")
    assert page.read_text().count("<figure>") == 24
    third = subprocess.run(command(killed, llava), capture_output=True, text=True, check=True)
    assert "0 shards made" in third.stdout
    encode = [PIPELINE, "run", "encode", "--source", "openmoji", "--root", str(whole)]
    encode += ["--captions", f"{llava}.long.short", "--resolutions", "64", "--small", "upscale"]
    done = subprocess.run(encode, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""The download stage over a source some of whose links are dead for a while."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from pipeline.core.catalog import Catalog
from pipeline.core.commits import read_commit, read_file
from pipeline.core.errors import SettingError
from pipeline.core.rules import Rules
from pipeline.core.samples import FAILED, ImageRef, InputShard, RawImage, Reject, sample_key
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.core.tars import read_samples
from pipeline.engine.plan import Choice, plan
from pipeline.sources.openmoji import BACKGROUNDS, render
from pipeline.stages.download import Download
from tests.pipeline.helpers.roots import run_here, tree

GROUP = "flaky/images"
GLYPHS = ("avocado", "rocket", "red heart", "fox")


class Flaky(BaseModel):
    """Six shards of six pictures; those whose keys `dead` names fail, key 5 is a copy of key 2."""

    rules: ClassVar[Rules] = Rules(min_image_size=0)

    dead: dict[str, str] = {}  # key -> reason
    fetched: list[str] = []

    def shards(self) -> list[InputShard]:
        return [InputShard(f"{n:05d}", "train", (n,)) for n in range(6)]

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        for index in range(6):
            key = sample_key(shard.id, index)
            if only is not None and key not in only:
                continue
            self.fetched.append(key)
            if key in self.dead:
                yield Reject(key, "download", self.dead[key], "404")
                continue
            glyph = GLYPHS[2 if index == 5 else index % 4]
            colour = list(BACKGROUNDS.values())[2 if index == 5 else index]
            yield RawImage(ImageRef(key, f"x:{key}", f"<b>{glyph}</b>"), render(glyph, 48, colour))

    def decisive(self) -> dict[str, Any]:
        return {}

    def estimate(self, shard: InputShard) -> int:
        return 10_000

    def samples(self, shard: InputShard) -> int:
        return 6


def stage(source: Flaky, **given) -> Download:
    return Download("flaky", source, **given)


def test_retry_failed_gives_what_a_run_without_failures_gives(tmp_path):
    dead = {"000000001": FAILED, "000000002": FAILED, "000000003": "opted-out"}
    source = Flaky(dead=dead)
    store = Store(tmp_path / "retried")
    run_here(stage(source), store, Choice(shards="0-1"))
    commit = read_commit(store, GROUP, "00000")
    assert commit is not None
    assert commit.rejects == {FAILED: 2, "opted-out": 1}
    assert commit.samples == 3  # the copy was the only one left
    source.dead = {"000000003": "opted-out"}
    source.fetched.clear()
    again = Choice(retry_failed=True, shards="0-1")
    assert run_here(stage(source, retry_failed=True), store, again) == 1
    assert source.fetched == ["000000001", "000000002"]
    whole = Store(tmp_path / "whole")
    run_here(stage(source), whole, Choice(shards="0-1"))
    new, expected = (read_commit(s, GROUP, "00000") for s in (store, whole))
    assert new is not None
    assert expected is not None
    assert new.rejects == expected.rejects == {"duplicate": 1, "opted-out": 1}
    for ending in (".tar", ".parquet"):
        assert read_file(store, GROUP, new, ending) == read_file(whole, GROUP, expected, ending)
    assert new.content() != commit.content()
    assert new.fingerprint == commit.fingerprint
    # Nothing failed any more: nothing is left to try.
    assert run_here(stage(source, retry_failed=True), store, again) == 0


def test_what_fails_again_changes_nothing(tmp_path):
    source = Flaky(dead={"000000001": FAILED})
    store = Store(tmp_path)
    run_here(stage(source), store, Choice(shards="0"))
    before = tree(tmp_path)
    assert run_here(stage(source, retry_failed=True), store, Choice("0", retry_failed=True)) == 1
    assert tree(tmp_path) == before


def test_a_reject_keeps_its_link_and_caption(tmp_path):
    store = Store(tmp_path)
    run_here(stage(Flaky()), store, Choice(shards="0"))
    commit = read_commit(store, GROUP, "00000")
    assert commit is not None
    (row,) = (r for r in rows_of(store, commit) if r["status"] == "duplicate")
    assert (row["url"], row["caption"]) == ("x:000000005", "<b>red heart</b>")


def rows_of(store: Store, commit) -> list[dict[str, Any]]:
    return from_parquet(read_file(store, GROUP, commit, ".parquet")).to_pylist()


def test_duplicates_name_the_first(tmp_path):
    store = Store(tmp_path)
    run_here(stage(Flaky()), store, Choice(shards="0"))
    commit = read_commit(store, GROUP, "00000")
    assert commit is not None
    rows = from_parquet(read_file(store, GROUP, commit, ".parquet")).to_pylist()
    assert rows[5]["status"] == "duplicate"
    assert "000000002" in rows[5]["error_message"]
    keys = [key for key, _ in read_samples(read_file(store, GROUP, commit, ".tar"))]
    assert keys == [f"00000000{n}" for n in range(5)]
    other = Store(tmp_path / "all")
    run_here(stage(Flaky(), rules=Rules(min_image_size=0, drop_duplicates=False)), other)
    found = read_commit(other, GROUP, "00000")
    assert found is not None
    assert found.samples == 6


def test_rules_are_in_the_fingerprint(tmp_path):
    store = Store(tmp_path)
    run_here(stage(Flaky()), store)
    found = plan(stage(Flaky(), rules=Rules(min_image_size=8)), Catalog(store)).groups[GROUP]
    assert list(found.stale) == ["rules.min_image_size: 0 -> 8"]


def test_captions_are_cleaned_by_rule(tmp_path):
    store = Store(tmp_path)
    rules = Rules(min_image_size=0, clean_captions=True)
    run_here(stage(Flaky(), rules=rules), store, Choice(shards="0"))
    commit = read_commit(store, GROUP, "00000")
    assert commit is not None
    rows = from_parquet(read_file(store, GROUP, commit, ".parquet")).to_pylist()
    assert rows[0]["caption"] == "avocado"
    fields = dict(read_samples(read_file(store, GROUP, commit, ".tar")))["000000000"]
    assert fields["txt"] == b"avocado"
    assert json.loads(fields["json"])["caption"] == "avocado"


def chosen(**given) -> list[str]:
    found = plan(stage(Flaky()), Catalog(Store("/nowhere")), Choice(**given))
    return list(found.pending)


def test_limit_takes_whole_shards_from_the_first():
    assert chosen(limit=1) == ["00000"]
    assert chosen(limit=6) == ["00000"]
    assert chosen(limit=7) == ["00000", "00001"]
    assert chosen(limit=10**9) == [f"{n:05d}" for n in range(6)]
    assert chosen(limit=7, shards="2-5") == ["00002", "00003"]


def test_a_larger_fraction_holds_the_smaller_one():
    shares = [set(chosen(fraction=fraction)) for fraction in (0.2, 0.5, 0.9, 1.0)]
    for smaller, larger in itertools.pairwise(shares):
        assert smaller <= larger
    assert 0 < len(shares[1]) < 6
    assert len(shares[-1]) == 6


@pytest.mark.parametrize(
    "given",
    [{"fraction": 0}, {"fraction": 1.5}, {"limit": 0}, {"force": True, "retry_failed": True}],
)
def test_choices_that_choose_nothing(given):
    with pytest.raises(SettingError, match=r"--(fraction|limit|force)"):
        chosen(**given)


def test_a_fraction_without_a_shard_says_so():
    with pytest.raises(SettingError, match="none of the 6 input shards"):
        chosen(fraction=1e-6)

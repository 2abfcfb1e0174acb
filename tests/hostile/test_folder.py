"""Every hostile picture, caption and name, through the folder source and the download stage."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from pipeline.core.store import Store
from tests.hostile import corpus, make
from tests.hostile.case import SAMPLE
from tests.hostile.corpus import SLOW
from tests.pipeline.helpers.roots import tree

BOUND = 1_500_000_000  # bytes of memory: 11 for each of MAX_PIXELS, and the libraries


def params(which: str) -> list:
    return [
        pytest.param(which, case, id=f"{which}/{case.name}")
        for case in corpus.FOLDERS[which]
        if case.name not in SLOW
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict:
    """(folder, case) -> row of the parquet."""
    home = tmp_path_factory.mktemp("hostile")
    found = {}
    for which, cases in corpus.FOLDERS.items():
        cases = [case for case in cases if case.name not in SLOW]
        source = corpus.write(home / which / "in", which, cases)
        made = corpus.run(source, Store(home / which / "root"))
        found |= {
            (which, case.name): row
            for case, row in zip(corpus.in_order(source, cases), made, strict=True)
        }
    return found


@pytest.mark.parametrize(("which", "case"), [p for which in corpus.FOLDERS for p in params(which)])
def test_verdict(rows, which, case):
    row = rows[which, case.name]
    assert ("sample" if row["status"] == "success" else row["status"]) == case.verdict
    if case.verdict == SAMPLE:
        assert min(row["width"], row["height"]) >= 256
    else:
        assert row["error_message"]
        assert len(row["error_message"]) < 400


@pytest.mark.parametrize(("which", "case"), params("captions"))
def test_what_is_stored_of_a_caption_is_text(rows, which, case):
    caption = rows[which, case.name]["caption"]
    if case.verdict == SAMPLE:
        assert caption == " ".join(caption.split()) != ""
        assert len(caption) <= 10_000
        assert not {unicodedata.category(c) for c in caption} & {"Cc", "Cs"}


def test_the_program_in_a_picture_did_not_run(rows):
    assert not Path("/tmp/microdit-hostile").exists()


def test_the_readme_lists_every_case():
    assert Path(__file__).with_name("README.md").read_text() == make.table()
    for cases in make.KINDS.values():
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.slow
def test_all_of_it_within_memory_and_twice_the_same(tmp_path):
    """In a process of its own, the slow ones too."""
    found = []
    for number in ("1", "2"):
        command = [sys.executable, "-m", "tests.hostile.corpus"]
        command += [str(tmp_path / "in" / number), str(tmp_path / "out" / number)]
        done = subprocess.run(command, capture_output=True, timeout=300, check=True)
        found.append(json.loads(done.stdout))
    for which, cases in corpus.FOLDERS.items():
        for case in cases:
            status, detail = found[0]["verdicts"][which][case.name]
            assert status.replace("success", SAMPLE) == case.verdict, (case.name, detail)
    print(f"peak {found[0]['peak_bytes'] / 1e6:.0f} MB")
    assert found[0]["peak_bytes"] < BOUND
    for which in corpus.FOLDERS:
        first, second = (tree(tmp_path / "out" / number / which) for number in ("1", "2"))
        assert first == second

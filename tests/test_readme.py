"""The README is a run: every command it shows exists, and the cheap ones are run as written."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT

README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def commands() -> list[str]:
    """Lines of the README's sh blocks, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def test_it_shows_the_two_commands_and_the_pictures():
    assert "make demo" in commands()
    assert "make test" in commands()
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / image).is_file(), image


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    shown = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert shown
    assert shown <= targets


def test_every_yaml_and_folder_of_the_tree_exists():
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert tree
    names = re.findall(r"^(\S+)", tree[1], re.MULTILINE)
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists(), name
    for name in re.findall(r"yamls/[\w/.-]+\.yaml", README):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("pipeline ")])
def test_every_pipeline_command_parses(line):
    words = shlex.split(line)
    known = subprocess.run(
        [BIN / "pipeline", *words[1:3], "--help"]
        if words[1] == "run"
        else [BIN / "pipeline", words[1], "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert known.returncode == 0, known.stderr
    for flag in (word for word in words if word.startswith("--")):
        assert flag in known.stdout, flag


@pytest.mark.slow
@pytest.mark.parametrize("line", [c for c in commands() if "dry_run=true" in c])
def test_every_dry_run_runs(line):
    words = shlex.split(line)
    words[0] = str(BIN / words[0])
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "parameters" in result.stdout

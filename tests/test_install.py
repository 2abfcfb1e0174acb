"""The package away from its checkout: installed, and used from another folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.resources import files
from pathlib import Path

import pytest

from pipeline.config import default_yaml, load_config
from pipeline.sources import SOURCES
from tests.checkout import ROOT

BUILT = ("pipeline", "captioning", "training", "yamls", "pyproject.toml", "README.md")


def test_sources_have_their_settings_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (Path(str(files("pipeline.sources"))) / "yamls").is_dir()
    assert load_config("openmoji", None, {}).encode.text_encoder == "tiny-clip"
    for name in SOURCES:
        assert default_yaml(name), name
    assert default_yaml("mine") is None
    Path("yamls/data").mkdir(parents=True)
    Path("yamls/data/openmoji.yaml").write_text("encode: {vae: tiny16}")
    assert load_config("openmoji", None, {}).encode.vae == "tiny16"


@pytest.mark.slow
def test_a_wheel_runs_from_another_folder(tmp_path: Path) -> None:
    checkout, fresh, elsewhere = (tmp_path / name for name in ("checkout", "fresh", "elsewhere"))
    for folder in (checkout, elsewhere):
        folder.mkdir()
    for name in (*BUILT, "LICENSE", "NOTICE"):
        own = ROOT / name
        if own.is_dir():
            shutil.copytree(own, checkout / name, symlinks=True)
        else:
            shutil.copy(own, checkout)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.rmtree(checkout)
    venv.create(fresh)
    (site,) = fresh.glob("lib/python*/site-packages")
    shutil.unpack_archive(wheel, site, "zip")  # which is what installing is, of pure Python
    # The locked packages behind it; the editable install among them is not followed from there.
    (site / "locked.pth").write_text(sysconfig.get_paths()["purelib"])

    def run(*arguments: str) -> str:
        start = f"import pipeline.cli as c; assert {str(site)!r} in c.__file__; c.main()"
        done = subprocess.run(
            [fresh / "bin" / "python", "-c", start, *arguments],
            cwd=elsewhere,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    part = ["--source", "openmoji", "--shards", "00000", "--workers", "1"]
    assert "1 shards made" in run("run", "download", *part)
    assert "1 shards made" in run("run", "caption", *part)
    assert "1 shards made" in run("run", "encode", "--vae", "tiny4", *part)
    assert "latents/tiny4/128" in run("status")

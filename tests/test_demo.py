"""The demo line in small: every command of infra/demo.sh, a short training, a finished sheet."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demos_commands_run_end_to_end_with_few_steps(tmp_path):
    script = (ROOT / "infra/demo.sh").read_text().replace("\\\n", " ")
    steps = [shlex.split(line)[1:] for line in re.findall(r"^step .*", script, re.MULTILINE)]
    assert [step[:3] for step in steps[:3]] == [
        ["pipeline", "run", "download"],
        ["pipeline", "run", "caption"],
        ["pipeline", "run", "encode"],
    ]
    (tmp_path / "yamls").symlink_to(ROOT / "yamls")
    (tmp_path / "training").symlink_to(ROOT / "training")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for step in steps:
        if step[0] == "composer":
            step += ["stages.masked.steps=4", "stages.masked.warmup=2", "stages.full.steps=3"]
        if "training.generate" in step or "training.scores" in step:
            step += ["--steps", "3"]
        if "training.scores" in step:
            step += ["--count", "8"]
        result = subprocess.run(
            step, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{step}\n{result.stdout}\n{result.stderr}"
    scores = json.loads((tmp_path / "out/demo/scores.json").read_text())
    assert set(scores["splits"]) == {"train", "heldout"}
    for row in scores["splits"].values():
        assert row["pictures"] == 8
        assert row["real"] >= 0.75  # the judge knows the real pictures
        assert 0 <= row["generated"] <= 1
    for name in ("out/demo/train.png", "out/demo/heldout.png", "out/prompts/sheet.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    tune(tmp_path, env)


def tune(folder: Path, env: dict[str, str]) -> None:
    """The commands of docs/train.md, "Starting from weights", with few steps: the demo's weights,
    and the same as an official file in the place of the released ones."""

    def run(*words: str) -> None:
        result = subprocess.run(
            words, cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"

    docs = (ROOT / "docs/train.md").read_text().partition("### Starting from weights")[2]
    demo, released = re.findall(r"```bash\n(.*?)```", docs, re.DOTALL)[:2]
    for line in demo.splitlines():
        words = shlex.split(line)
        if words[0] == "composer":
            words += ["stages.full.steps=3", "stages.full.warmup=1"]
        run(*words, *(["--steps", "2"] if "training.generate" in words else []))
    assert (folder / "out/tune-demo/sheet.png").exists()

    make, download, encode, train = map(shlex.split, released.splitlines())
    assert download[:3] == ["pipeline", "run", "download"]
    run("python", "-m", *shlex.split("training.convert export runs/demo --to official --out w.pt"))
    make[make.index("import") + 1] = "w.pt"
    encoders = ["--vae", "tiny4", "--text-encoder", "tiny-clip"]
    run(*make, "--arch", "yamls/demo.yaml", *encoders)
    encode[encode.index("folder")] = "openmoji"
    run(*encode, "--text", "full")
    sizes = ["steps=2", "warmup=1", "resolution=128", "batch_size=8", "microbatch=8"]
    data = ["sources=[openmoji]", "captions=alt:0.9,colour:0.1", "workers=0"]
    run(*train, *(f"stages.512-full.{size}" for size in sizes), *(f"data.{item}" for item in data))
    assert (folder / "runs/tune/model.safetensors").exists()

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.encoders import TEXT_ENCODERS, VAES, text_facts, vae_facts
from tests.pipeline.helpers.command import call

PIPELINE = Path(sys.executable).with_name("pipeline")


LLAVA = ["run", "caption", "--source", "openmoji", "--captioner", "llava-1.5-7b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], 'did you mean "run"'),
        (["run", "encod"], 'did you mean "encode"'),
        (["run", "download", "--source", "openmojy"], 'did you mean "openmoji"'),
        (["run", "download"], "--source openmoji"),
        (["run", "download", "--source", "openmoji", "--set", "glyph=all"], 'mean "glyphs"'),
        (["run", "download", "--source", "openmoji", "--set", "size=big"], "download.size|size="),
        (["run", "download", "--source", "openmoji", "--set", "size"], "KEY=VALUE"),
        (["run", "download", "--sauce", "x"], "--sauce"),
        (["run", "caption", "--source", "openmoji", "--captioner", "color"], 'mean "colour"'),
        (["run", "caption", "--source", "openmoji", "--captioner", "no/such"], "fetch no/such"),
        (["run", "caption", "--source", "openmoji", "--prompt", "short"], "prompt: no setting of"),
        (["run", "caption", "--source", "openmoji", "--clean", "lowr"], 'did you mean "lower"'),
        (["run", "caption", "--source", "openmoji", "--set", "x"], "KEY=VALUE"),
        ([*LLAVA, "--prompt", "shrot"], 'did you mean "short"'),
        ([*LLAVA, "--num-captions", "3"], "at temperature 0 a prompt gives one caption"),
        ([*LLAVA, "--set", "threads=many"], "caption.threads='many'"),
        (["run", "encode", "--source", "openmoji", "--vae", "tiny5"], 'did you mean "tiny4"'),
        (["run", "encode", "--source", "openmoji", "--resolutions", "a"], "resolutions"),
        (["run", "encode"], "pipeline run download"),
        (["run", "all"], "--source or --config"),
        (["run", "all", "--config", "nowhere.yaml"], "No such file"),
        (["status"], "pipeline run download"),
        (["fetch", "sdxll"], 'did you mean "sdxl"'),
    ],
)
def test_bad_input_is_one_line_and_exit_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setenv("MICRODIT_ROOT", str(tmp_path / "root"))
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert any(part in err for part in message.split("|")), err


def test_a_password_in_a_setting_is_not_said_again(monkeypatch, capsys, tmp_path):
    base = "base=https://me:s3cr3t@host/x?sig=s3cr3t"
    code, out, err = call(
        monkeypatch, capsys, "run", "download", "--source", "cc12m", "--set", base
    )
    assert (code, out) == (2, "")
    assert "base='https://host/x?…': must hold no user" in err
    assert "s3cr3t" not in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: openmoji\nencode: {vea: tiny4}", 'encode.vea; did you mean "vae"'),
        ("source: openmoji\nencodes: {}", 'encodes; did you mean "encode"'),
        ("source: openmoji\nencode: {batch_size: many}", "encode.batch_size='many'"),
        ("source: [", "not YAML"),
        ("- openmoji", "expected a mapping"),
        ("encode: {}", "source"),
    ],
)
def test_a_bad_yaml_is_one_line_and_exit_2(monkeypatch, capsys, tmp_path, text, message):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    code, _, err = call(monkeypatch, capsys, "run", "all", "--config", str(path))
    assert code == 2
    assert err.count("\n") == 1
    assert message in err


def test_help_answers_at_once_and_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['pipeline', '--help']\n"
        "from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'ray', 'diffusers', 'pyarrow', 'streaming')\n"
        "print([module for module in heavy if module in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
    times = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run([PIPELINE, "--help"], capture_output=True, check=True)
        times.append(time.monotonic() - start)
    assert min(times) < 0.5


def test_an_encoder_that_is_not_cached_names_the_command_that_fetches_it(tmp_path):
    result = subprocess.run(
        [PIPELINE, "run", "encode", "--source", "openmoji", "--vae", "sdxl"],
        env={**os.environ, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "pipeline fetch sdxl" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", VAES)
def test_every_vae_of_the_table_states_its_facts_without_weights(name):
    facts = vae_facts(name)
    assert facts.downsample == 8
    assert facts.channels in (4, 16)
    assert 0 < facts.scale < 10


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_every_text_encoder_of_the_table_states_its_facts_without_weights(name):
    facts = text_facts(name)
    assert (facts.width, facts.length) in ((1024, 77), (128, 32))


def test_the_weights_that_ship_fit_in_10_mb():
    folder = Path(VAES["tiny4"][0]).parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 10e6


@pytest.mark.parametrize("name", ["sdxl", "dfn5b-h14", "llava-1.5-7b", "owner/model@main"])
def test_fetching_without_a_network_is_one_line(tmp_path, name):
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [str(Path(sys.executable).parent / "pipeline"), "fetch", name]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"pipeline: fetch {name}: http://127.0.0.1:9 cannot be reached (")
    assert "HF_ENDPOINT" in line


@pytest.mark.parametrize(
    ("yaml", "line"),
    [
        ("rules: {min_image_size: null}", "rules: min_image_size=null: 0 turns it off"),
        ("max_reject_rate: null", "max_reject_rate=null: 0 turns it off"),
        ("encode: {seed: null}", "encode.seed=null: needs a value; leave it out"),
    ],
)
def test_null_is_answered_with_what_to_write(monkeypatch, capsys, tmp_path, yaml, line):
    path = tmp_path / "data.yaml"
    path.write_text(f"source: openmoji\n{yaml}\n")
    code, _, err = call(monkeypatch, capsys, "run", "download", "--config", str(path), "--dry-run")
    assert code == 2
    assert line in err

"""infra/slurm*.sh run for real, with programs in Slurm's place: no Slurm is needed or tested."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkout import ROOT
from training.launch import PATIENCE

BIN = Path(sys.executable).parent

JOB_ID = str(os.getpid())
RAY_LOGS = f"/tmp/microdit-{JOB_ID}"

# srun without the nodes: the command of the step, once, here.
SRUN = """
while [[ "$1" == -* ]]; do shift; done
exec "$@"
"""
# Ray without Ray. `start` notes what it was given and stays; the others answer from the notes.
RAY = """
echo "$*" >> "$NOTES/ray"
case "$1" in
    start)
        stat -c %a "$RAY_AUTH_TOKEN_PATH" >> "$NOTES/mode"
        cat "$RAY_AUTH_TOKEN_PATH" >> "$NOTES/token"; echo >> "$NOTES/token"
        echo "$RAY_AUTH_MODE ${RAY_AUTH_TOKEN:-unset}" >> "$NOTES/auth"
        [[ -z "${RAY_DIES:-}" ]] || { echo "no port for you"; exit 1; }
        echo $$ >> "$NOTES/pids"
        exec tail -f /dev/null ;;
    health-check) test -e "$NOTES/pids" ;;
    status) while read -r _; do echo " 1 node_x"; done < "$NOTES/pids" ;;
esac
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a script as Slurm would on the first of two nodes; its folder is `tmp_path`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (tmp_path / "notes").mkdir()

    def program(name: str, text: str) -> None:
        path = programs / name
        path.write_text(f"#!/usr/bin/env bash\nset -eu\n{text}")
        path.chmod(0o755)

    program("srun", SRUN)
    program("scontrol", '[[ "$*" == "show hostnames node[0-1]" ]]; echo node0; echo node1')
    started: list[subprocess.Popen[str]] = []

    def start(
        script: str, *arguments: str, real_ray: bool = False, pipeline: str = "", **extra: str
    ) -> subprocess.Popen[str]:
        if not real_ray:
            program("ray", RAY)
        for name in ("pipeline", "python"):
            if pipeline:
                program(name, pipeline)
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RAY_", "SLURM_", "MICRODIT_"))
        }
        environment |= {
            "PATH": f"{programs}:{BIN}:{os.environ['PATH']}",
            "NOTES": str(tmp_path / "notes"),
            "SLURM_JOB_ID": JOB_ID,
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_CPUS_PER_TASK": "1",
            "MICRODIT_HEAD_IP": "127.0.0.1",
            **extra,
        }
        process = subprocess.Popen(
            ["bash", ROOT / "infra" / script, *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that what it leaves can be ended, and nothing else
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for pid in ray_processes():
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(RAY_LOGS, ignore_errors=True)


def notes(folder: Path, name: str) -> list[str]:
    return (folder / "notes" / name).read_text().splitlines()


def nothing_is_left(folder: Path) -> bool:
    """No Ray process that the script started is there, and no token."""
    pids = folder / "notes" / "pids"
    alive = [p for p in (pids.read_text().split() if pids.exists() else []) if _runs(int(p))]
    return not alive and not list(folder.glob(".ray-*"))


def ray_processes() -> list[int]:
    """Processes of the Ray that this test run started: its folder is on their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"{RAY_LOGS}/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_it_starts_a_head_and_workers_with_a_token_of_their_own(job, tmp_path):
    process = job(
        "slurm.sh", "pipeline", "run", "caption", "--root", "x y", pipeline='printf "<%s>" "$@"'
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    head, workers = (line for line in notes(tmp_path, "ray") if line.startswith("start"))
    assert "--head" in head
    assert "--num-cpus=1" in head
    port = re.search(r"--port=(\d+)", head)
    assert port
    address = f"127.0.0.1:{port[1]}"
    assert f"--address={address}" in workers
    assert f"<run><caption><--root><x y><--address><{address}>" in output
    assert notes(tmp_path, "mode") == ["600", "600"]
    assert notes(tmp_path, "auth") == ["token unset", "token unset"]
    token, same = notes(tmp_path, "token")
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert token == same
    assert token not in output
    assert token not in "\n".join(notes(tmp_path, "ray"))
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("code", [1, 2, 130])
def test_it_ends_with_the_pipelines_own_code(job, tmp_path, code):
    process = job("slurm.sh", "pipeline", "run", "encode", pipeline=f"exit {code}")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert nothing_is_left(tmp_path)


def test_slurms_warning_reaches_the_pipeline_and_its_answer_is_awaited(job, tmp_path):
    answer = "trap 'echo told; echo committed; exit 7' TERM"
    pipeline = f"{answer}; echo ready; while :; do read -rt 1 || :; done"
    process = job("slurm.sh", "pipeline", "run", "encode", pipeline=pipeline)
    assert process.stdout
    before = []
    for line in process.stdout:
        before.append(line)
        if line == "ready\n":
            break
    process.send_signal(signal.SIGTERM)  # the script alone, as --signal=B: does
    output, _ = process.communicate(timeout=60)
    assert output.splitlines() == ["told", "committed"], (before, output)
    assert process.returncode == 7
    assert nothing_is_left(tmp_path)


def test_a_signal_between_the_start_and_its_note_leaves_nothing(job, tmp_path):
    text = (ROOT / "infra/slurm.sh").read_text()
    start, note = '"$@" --address "$address" &\n', "pipeline=$!\n"
    assert start + note in text
    (tmp_path / "slurm.sh").write_text(text.replace(start + note, f"{start}kill -TERM $$\n{note}"))
    pipeline = "while :; do read -rt 1 || :; done"
    process = job(tmp_path / "slurm.sh", "pipeline", "run", "encode", pipeline=pipeline)
    process.communicate(timeout=60)  # which waits for all that write to its output
    assert process.returncode == 143
    assert nothing_is_left(tmp_path)


def test_a_ray_that_does_not_start_is_shown(job, tmp_path):
    process = job("slurm.sh", "pipeline", "run", "encode", pipeline="exit 0", RAY_DIES="1")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "no port for you" in output
    assert "Ray ended while the head on" in output
    assert nothing_is_left(tmp_path)


def test_the_wait_for_ray_has_an_end(job, tmp_path):
    process = job("slurm.sh", "pipeline", "run", "encode", MICRODIT_START_LIMIT_S="0")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "not in 0 s" in output
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("arguments", [[], ["python", "x.py"], ["pipeline", "status"]])
def test_another_command_is_refused(job, arguments):
    process = job("slurm.sh", *arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "pipeline run encode" in output


def test_training_gets_the_patient_launcher_and_its_variables(job):
    show = 'echo "$* $WORLD_SIZE $LOCAL_WORLD_SIZE $NODE_RANK $MASTER_ADDR $MASTER_PORT"'
    process = job(
        "slurm-train.sh",
        *("yamls/1b.yaml", "name=a b"),
        pipeline=show,
        SLURM_GPUS_ON_NODE="8",
        SLURM_NODEID="1",
        SLURM_JOB_ID="41234",
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    launched = "-m training.launch training/train.py yamls/1b.yaml name=a b"
    assert output == f"{launched} 16 8 1 node0 31234\n"


def test_slurm_warns_as_long_before_the_limit_as_the_launcher_waits():
    text = (ROOT / "infra/slurm-train.sh").read_text()
    warning = re.search(r"^#SBATCH --signal=TERM@(\d+)$", text, re.MULTILINE)
    assert warning is not None
    assert int(warning[1]) >= PATIENCE.total_seconds()


# In the place of training/train.py: a rank that needs a while to end in order.
RANK = """
import os, pathlib, signal, sys, time

def save(number, frame):
    time.sleep(1)
    pathlib.Path(f"saved-{rank}").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
rank = os.environ["RANK"]
if rank == "2":
    print("started", *sys.argv[1:], os.environ["WORLD_SIZE"], flush=True)
pathlib.Path(f"up-{rank}").touch()
time.sleep(120)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_real_launcher_starts_and_ends_a_nodes_ranks(job, tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training/train.py").write_text(RANK)
    process = job(
        "slurm-train.sh",
        "yamls/1b.yaml",
        SLURM_GPUS_ON_NODE="2",
        SLURM_NODEID="1",
        PYTHONPATH=str(ROOT),
    )
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"up-{rank}").exists() for rank in (2, 3)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # the script has become the launcher
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "started yamls/1b.yaml 4" in output
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (2, 3))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_ray_of_two_nodes_makes_the_shards(job, tmp_path):
    """Head and worker are both here: two raylets on this machine, one CPU each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = job(
        "slurm.sh",
        *("pipeline", "run", "download", "--source", "openmoji", "--root", str(tmp_path / "root")),
        *("--set", "glyphs=avocado", "--set", "size=32"),
        real_ray=True,
        MICRODIT_PORT=str(port),
        HOME=str(tmp_path),  # no token of the user's own is there to help
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "Ray on 2 nodes" in output
    assert re.search(r"download openmoji: \d+ shards? made", output), output
    assert list((tmp_path / "root/openmoji/images").glob("*.tar"))
    assert nothing_is_left(tmp_path)
    assert not ray_processes()

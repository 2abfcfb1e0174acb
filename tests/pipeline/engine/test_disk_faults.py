"""Disks that fill up, are read-only or belong to somebody else: one clear error, nothing lost.

Real file systems: a small tmpfs that the test mounts, and another user id for the permissions.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import build_stage, load_config
from pipeline.core.commits import read_commits
from pipeline.core.errors import StorageError
from pipeline.core.store import TEMPORARY, Store, sha256
from pipeline.engine.inventory import groups_of
from tests.checkout import ROOT
from tests.pipeline.helpers.roots import run_here, tree

PIPELINE = Path(sys.executable).with_name("pipeline")
CONFIG = """
source: openmoji
download: {glyphs: avocado;rocket;red heart;fox, size: 64, samples_per_shard: 4}
encode:
  vae: tiny4
  text_encoder: tiny-clip
  resolutions: [64]
  captions: alt:0.5,colour:0.5
  text: trimmed
"""
STAGES = ("download", "caption", "encode")
NOBODY = 65534
ROOMY = "64m"


class Disk:
    """A tmpfs of a size that can be changed."""

    def __init__(self, path: Path, size: str) -> None:
        self.path = path
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(path)]
        try:
            subprocess.run(mount, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot mount a tmpfs here: {getattr(error, 'stderr', '') or error}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def fill(self) -> None:
        """Takes every byte that is left, as somebody else's file would."""
        with contextlib.suppress(OSError), open(self.path / "filler", "ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def release(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk", ROOMY)
    yield disk
    disk.release()


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "data.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed")
    run_all(config, Store(root))
    return tree(root)


def run_all(config: Path, store: Store) -> None:
    data = load_config(None, config, {})
    for name in STAGES:
        run_here(build_stage(name, data), store)


def pipeline(
    config: Path, root: Path, *words: str, before: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, str(PIPELINE), *words, "--config", str(config), "--root", str(root)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=200,
    )


def one_line(result: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()  # before it perhaps what a run announces it will need
    assert [line for line in lines if line.startswith("pipeline: ")] == lines[-1:]
    return lines[-1]


def copy_inputs(files: dict[str, bytes], root: Path) -> None:
    """A root on which download and caption have run, encode not."""
    for name, data in files.items():
        if "/images/" in name or "/captions/" in name:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)


def assert_whole(root: Path, undisturbed: dict[str, bytes]) -> int:
    """Every commit is the undisturbed one and so are its files; nothing is half made."""
    assert not [path for path in root.rglob("*") if TEMPORARY in path.name]
    store = Store(root)
    count = 0
    for group in groups_of(store, "openmoji") if (root / "openmoji").exists() else ():
        for shard, commit in read_commits(store, f"openmoji/{group}").items():
            count += 1
            name = f"openmoji/{group}/commits/{shard}.json"
            assert store.read(name) == undisturbed[name]
            for name, facts in commit.files.items():
                data = store.read(f"openmoji/{group}/{name}")
                assert (len(data), sha256(data)) == (facts["bytes"], facts["sha256"])
    return count


# --- Full


@pytest.mark.slow
def test_a_disk_that_fills_up_again_and_again_costs_no_finished_shard(disk, config, undisturbed):
    """It grows by a little whenever it was full: a run dies at every stage, of many writes."""
    size, errors, counts = 32, [], [0]
    disk.remount(f"size={size}k")
    while True:
        try:
            run_all(config, Store(disk.path))
            break
        except StorageError as error:
            errors.append(str(error))
        counts.append(assert_whole(disk.path, undisturbed))
        size += 48
        disk.remount(f"size={size}k")
    assert {error.split("/openmoji/")[1].split("/")[0] for error in errors} >= {
        *("images", "captions", "latents", "text")
    }
    for error in errors:
        assert error.startswith(f"cannot write {disk.path}/openmoji/")
        for part in ("disk full", " needed, ", " free; free some space"):
            assert part in error
    assert counts == sorted(counts)
    assert tree(disk.path) == undisturbed


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_command_and_a_rerun_completes(disk, config, undisturbed):
    root = disk.path / "root"
    copy_inputs(undisturbed, root)
    over = threading.Event()

    def fill_after_the_first_commit() -> None:
        while not over.wait(0.005):
            if list(root.glob("openmoji/text/*/*/commits/*.json")):
                disk.fill()

    thread = threading.Thread(target=fill_after_the_first_commit)
    thread.start()
    try:
        result = pipeline(config, root, "run", "encode", "--workers", "1")
    finally:
        over.set()
        thread.join()
    line = one_line(result)
    assert line.startswith(f"pipeline: cannot write {root}/openmoji/")
    assert "disk full" in line
    assert " needed, 0 B free; free some space" in line
    done = assert_whole(root, undisturbed)
    disk.remount("size=128m")
    result = pipeline(config, root, "run", "encode", "--workers", "1")
    assert result.returncode == 0, result.stderr
    assert assert_whole(root, undisturbed) > done
    assert tree(root) == undisturbed


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_refused_before_the_run(disk, config):
    disk.remount("size=16k")
    line = one_line(pipeline(config, disk.path, "run", "download"), 2)
    assert "download openmoji needs about" in line
    assert "is free there; free some" in line
    assert tree(disk.path) == {}


# --- Read-only


@pytest.mark.slow
def test_a_read_only_root_ends_a_run_before_it_begins_and_can_be_looked_at(
    disk, config, undisturbed
):
    root = disk.path / "root"
    copy_inputs(undisturbed, root)
    before = tree(root)
    disk.remount("ro")
    for stage in ("download", "encode"):
        line = one_line(pipeline(config, root, "run", stage))
        assert line.startswith(f"pipeline: cannot write {root}/openmoji/")
        assert "read-only file system; mount it writable or choose another --root" in line
    assert tree(root) == before
    assert pipeline(config, root, "status").returncode == 0


# --- Somebody else's


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's are not, with a short path for Ray."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def foreign(common, undisturbed) -> Path:
    """A root on which encode is left to do, of the other user."""
    root = common / "root"
    copy_inputs(undisturbed, root)
    give(root)
    return root


def give(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)


def as_nobody(
    common: Path, config: Path, root: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    """The command itself under another user id.

    Where others may not enter a folder above Python or the project (/root), the command gets a
    view of the file system in which they may.
    """
    if os.getuid():
        pytest.skip("only root can become another user")
    mine = common / "mine"
    for folder in (mine, mine / "home", mine / "ray", common / "keep"):
        folder.mkdir(exist_ok=True)
        os.chown(folder, NOBODY, NOBODY)
    copy = common / "data.yaml"
    copy.write_bytes(config.read_bytes())
    script = ["set -e"]
    needed = [Path(sys.base_prefix).resolve(), ROOT]
    for number, path in enumerate(needed):
        if _closed(path):
            kept = common / "keep" / str(number)
            script += [f"mkdir -p {kept}", f"mount --bind {path} {kept}"]
    # Weights of a working tree may be its owner's alone, as safetensors writes them.
    weights = ROOT / "pipeline/encoders/weights"
    shutil.copytree(weights, common / "weights", dirs_exist_ok=True)
    for path in (common / "weights").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for top in {top for path in needed if (top := _closed(path))}:
        script.append(f"mount -t tmpfs -o mode=755 tmpfs {top}")
    for number, path in enumerate(needed):
        if _closed(path):
            script += [f"mkdir -p {path}", f"mount --bind {common / 'keep' / str(number)} {path}"]
    script.append(f"mount --bind {common / 'weights'} {weights}")
    script.append(f'exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups -- "$@"')
    unshare = ("unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(script), "")
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("cannot make a mount namespace here")
    environment = {"HOME": str(mine / "home"), "RAY_TMPDIR": str(mine / "ray")}
    return pipeline(copy, root, *words, before=unshare, **environment)


def _closed(path: Path) -> Path | None:
    """The topmost folder on the way that others may not enter."""
    for folder in [*reversed(path.parents), path]:
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


@pytest.mark.slow
def test_the_other_user_can_encode_where_nothing_is_forbidden(common, foreign, config, undisturbed):
    result = as_nobody(common, config, foreign, "run", "encode", "--workers", "1")
    assert result.returncode == 0, result.stderr
    assert tree(foreign) == undisturbed


@pytest.mark.slow
def test_an_unreadable_root_is_one_line(common, foreign, config):
    for path in (foreign, foreign / "openmoji"):
        os.chown(path, 0, 0)
        path.chmod(0o700)
        for words in (("status",), ("run", "encode")):
            line = one_line(as_nobody(common, config, foreign, *words))
            assert line.startswith("pipeline: cannot ")
            assert str(foreign) in line
            assert f"permission denied: uid {NOBODY} has no right to" in line
            assert "run as its owner, or choose another --root" in line
        path.chmod(0o755)
        os.chown(path, NOBODY, NOBODY)


@pytest.mark.slow
def test_an_unwritable_group_ends_the_run_before_it_begins(common, foreign, config):
    group = foreign / "openmoji/text"
    group.mkdir(mode=0o755)
    before = tree(foreign)
    line = one_line(as_nobody(common, config, foreign, "run", "encode"))
    assert line.startswith(f"pipeline: cannot write {group}/")
    assert f"permission denied: uid {NOBODY} has no right to write here" in line
    assert tree(foreign) == before


@pytest.mark.slow
def test_an_unreadable_shard_is_named(common, foreign, config, undisturbed):
    tar = foreign / "openmoji/images/00001.tar"
    os.chown(tar, 0, 0)
    tar.chmod(0o600)
    line = one_line(as_nobody(common, config, foreign, "run", "encode", "--workers", "1"))
    assert line.startswith(f"pipeline: cannot read {tar}: permission denied: uid {NOBODY}")
    assert_whole(foreign, undisturbed)
    tar.chmod(0o644)
    result = as_nobody(common, config, foreign, "run", "encode", "--workers", "1")
    assert result.returncode == 0, result.stderr
    assert tree(foreign) == undisturbed


@pytest.mark.slow
def test_what_cannot_be_read_is_never_taken_for_nothing(common, foreign):
    """A folder that the listing skipped would be a smaller root: to a quota, or to a prune."""
    closed = foreign / "openmoji/images"
    os.chown(closed, 0, 0)
    closed.chmod(0o700)
    code = (
        "import os, sys; from pipeline.core.store import Store; store = Store(sys.argv[1])\n"
        "from pipeline.core.errors import StorageError\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "for call in (lambda: list(store.walk('')), lambda: store.names('openmoji/images'),\n"
        "             lambda: store.entries('openmoji/images'),\n"
        "             lambda: store.folders('openmoji/images'),\n"
        "             lambda: store.exists('openmoji/images/00000.tar'),\n"
        "             lambda: list(store.read_many(['openmoji/images/00000.tar']))):\n"
        "    try: print(call())\n"
        "    except StorageError as error: print(error)\n"
    )
    if os.getuid():
        pytest.skip("only root can become another user")
    result = subprocess.run(
        [sys.executable, "-c", code, str(foreign)], cwd=ROOT, capture_output=True, text=True
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 6, result.stderr
    for line in lines:
        assert line.startswith(f"cannot read {foreign}")
        assert "permission denied" in line


# --- What cannot be had for real


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, r"disk full: 3 B needed, [\d.]+ \wB free; free some space, then run the"),
        (errno.EDQUOT, r"disk quota of uid \d+ exceeded: 3 B needed; free some space or"),
        (errno.EROFS, r"read-only file system; mount it writable or choose another --root"),
        (errno.EACCES, r"permission denied: uid \d+ has no right to write here; run as its owner"),
        (errno.EPERM, r"permission denied: uid \d+ has no right to write here; run as its owner"),
        (errno.EIO, r"Input/output error \(3 B to write\); once it works again, run the same"),
        (errno.ESTALE, r"Stale file handle \(3 B to write\); once it works again, run the same"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_what_a_write_met_is_said_with_path_and_remedy(tmp_path, monkeypatch, code, text):
    store = Store(tmp_path)
    store.write("g/x", b"old")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=rf"^cannot write {tmp_path}/g/x: {text}"):
        store.write("g/x", b"new")
    assert store.read("g/x") == b"old"
    assert store.names("g") == os.listdir(tmp_path / "g") == ["x"]

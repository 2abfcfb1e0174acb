"""Files of torch.save that are damaged: a line, whatever their bytes make of the unpickler."""

from __future__ import annotations

import io
import random
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import SettingError
from tests.training.weights.test_official import STATE, composer, refused, small
from training.convert import main
from training.weights import official, weights_file

MUTATIONS = 2000
ALTERED = composer({name: torch.ones(2) for name in list(STATE)[:12]})  # small: many are read


def saved(new_format: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(ALTERED, buffer, _use_new_zipfile_serialization=new_format)
    return buffer.getvalue()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """With one to four bytes changed, taken out or put in, a part repeated, or cut off."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(found)), rng.random()
        if kind < 0.5:
            found[at] = rng.randrange(256)
        elif kind < 0.65 and len(found) > 9:
            del found[at : at + rng.randint(1, 8)]
        elif kind < 0.8:
            found[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind < 0.9:
            found[at:at] = found[at : at + rng.randint(1, 40)]
        else:
            found = found[:at] or found
    return bytes(found)


def rezipped(data: bytes, rng: random.Random) -> bytes:
    """The new format with its pickle mutated and everything around it, checksums too, in order."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, mutated(content, rng) if name.endswith("data.pkl") else content)
    return target.getvalue()


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where there is one: writing thousands of files to a disk takes longer
    than reading them."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


def test_mutated_files_are_refused_in_a_line(memory: Path) -> None:
    new, old = saved(True), saved(False)
    kinds: list[Callable[[random.Random], bytes]] = [
        lambda rng: rezipped(new, rng),
        lambda rng: mutated(old, rng),
        lambda rng: mutated(new, rng),
        lambda rng: mutated(old, rng),
    ]
    path, causes = memory / "in.pt", Counter()
    for seed in range(MUTATIONS):
        path.write_bytes(kinds[seed % len(kinds)](random.Random(seed)))
        with pytest.raises(SettingError) as error:
            official.read(path)
        assert "\n" not in str(error.value), seed
        causes[type(error.value.__cause__).__name__] += 1
    # The mutations reach what they are meant for: a pickle's own instructions.
    assert {"UnpicklingError", "KeyError", "IndexError", "TypeError", "error"} <= causes.keys()


TIED = torch.ones(64)
STRUCTURES: dict[str, tuple[dict[Any, Any], str]] = {
    "positions of one axis": ({"pos_embed": torch.ones(16)}, "pos_embed is (16,), expected 3 axes"),
    "no positions": ({"pos_embed": torch.ones(1, 0, 64)}, "input_size 0"),
    "no square": ({"pos_embed": torch.ones(1, 15, 64)}, "pos_embed is (1, 15, 64), expected"),
    "two tables": ({"pos_embed": torch.ones(2, 16, 64)}, "pos_embed is (2, 16, 64), expected"),
    "another width": ({"pos_embed": torch.ones(1, 16, 60)}, "pos_embed is (1, 16, 60), expected"),
    "a scalar": ({"pos_embed": torch.tensor(1.0)}, "pos_embed is (), expected 3 axes"),
    "integers": ({"blocks.0.norm1.weight": torch.ones(64).long()}, "is of type int64"),
    "sparse": ({"blocks.0.norm1.weight": torch.ones(64).to_sparse()}, "dense floating point"),
    "NaN": (
        {"blocks.0.norm1.weight": torch.full((64,), float("nan"))},
        "64 of 64 values of blocks.0.norm1.weight are NaN or infinite",
    ),
    "integer keys": ({1: torch.ones(2)}, "no state dict"),
    "a name twice": ({"module.blocks.0.norm1.weight": torch.ones(64)}, "has a tensor twice"),
    "a bare name": ({"blocks": torch.ones(2)}, "blocks is (2,), expected missing"),
    "no tensor": ({"blocks.0.norm1.weight": [1.0]}, "no state dict"),
    "captions of one axis": (
        {"y_embedder.y_proj.fc1.weight": torch.ones(64)},
        "y_embedder.y_proj.fc1.weight is (64,), expected 2 axes",
    ),
    "no channels": ({"x_embedder.proj.weight": torch.ones(64, 0, 2, 2)}, "in_channels 0"),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_pickle_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    change, message = STRUCTURES[kind]
    torch.save(STATE | change, tmp_path / "in.pt")
    assert message in refused(capsys, "import", str(tmp_path / "in.pt"), *small(tmp_path))
    assert not (tmp_path / "in").exists()


def test_tied_tensors_are_written_apart(tmp_path: Path) -> None:
    tied = {"blocks.0.norm1.weight": TIED, "blocks.1.norm1.weight": TIED}
    torch.save(STATE | tied, tmp_path / "in.pt")
    assert main(["import", str(tmp_path / "in.pt"), *small(tmp_path)]) == 0
    tensors, _ = weights_file.read(tmp_path / "in/model.safetensors")
    assert all(torch.equal(tensors[name], TIED) for name in tied)


def test_a_pointer_of_git_lfs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("in.pt", "in.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
        assert "git lfs pull" in refused(capsys, "import", str(tmp_path / name))
        assert "is a folder" in refused(capsys, "import", str(tmp_path))

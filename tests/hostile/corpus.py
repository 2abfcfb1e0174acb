"""The hostile corpus as folders that the folder source reads, and what the stage made of it."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.engine.plan import Choice
from pipeline.sources.folder import Folder
from pipeline.stages.download import Download
from tests.hostile import captions, memory, names, pictures
from tests.hostile.case import Case
from tests.pipeline.helpers.roots import run_here

SLOW = {"allowed.png", "scan-bomb.jpg"}  # seconds each, the latter to be made
FOLDERS = {"pictures": pictures.CASES, "captions": captions.CASES, "names": names.CASES}


def write(home: Path, which: str, cases: list[Case]) -> Folder:
    """Makes a folder of the cases; the source that reads it."""
    home.mkdir(parents=True)
    source = {"pictures": _pictures, "captions": _captions, "names": _names}[which](home, cases)
    for path in (*home.rglob("*"), *home.parent.glob("*.jpg")):  # dates are in the fingerprint
        os.utime(path, (0, 0), follow_symlinks=False)
    return source


def _pictures(home: Path, cases: list[Case]) -> Folder:
    for case in cases:
        (home / case.name).write_bytes(case.make())
    return Folder(folder=str(home), captions="none", samples_per_shard=1000)


def _captions(home: Path, cases: list[Case]) -> Folder:
    for number, case in enumerate(cases):
        picture = home / Path(case.name).with_suffix(".jpg")
        picture.write_bytes(pictures.jpeg(1000 + number))
        (home / case.name).write_bytes(case.make())
    return Folder(folder=str(home), samples_per_shard=1000)


def _names(home: Path, cases: list[Case]) -> Folder:
    """The table, and what its names lead to."""
    (home / "good").mkdir()
    (home.parent / "secret.jpg").write_bytes(pictures.jpeg(1))
    (home / "linked.jpg").write_bytes(pictures.jpeg(2))
    for number, name in enumerate(
        ("roundabout", "two\nlines", "cafe\u0301 é 猫", "%2e%2e%2fgood", "--help")
    ):
        (home / f"{name}.jpg").write_bytes(pictures.jpeg(10 + number))
    for name, target in {
        "link-out.jpg": "../secret.jpg",
        "link-folder": "..",
        "zero.jpg": "/dev/zero",
        "link-nowhere.jpg": "nothing.jpg",
        "link-loop.jpg": "link-loop.jpg",
        "link-in.jpg": "linked.jpg",
    }.items():
        (home / name).symlink_to(target)
    os.mkfifo(home / "fifo.jpg")
    (home / "folder.jpg").mkdir()
    with open(home / "huge.jpg", "wb") as file:
        file.truncate(1 << 40)
    rows = ({"file_name": case.make().decode(), "text": case.name} for case in cases)
    (home / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Folder(folder=str(home), table="table.jsonl", samples_per_shard=1000)


def run(source: Folder, store: Store) -> list[dict[str, Any]]:
    """Rows of the shard's parquet, in order: one for each case.

    Every picture may be rejected: this corpus is meant to be.
    """
    assert run_here(Download("folder", source, max_reject_rate=1.0), store, Choice()) == 1
    return from_parquet(store.read("folder/images/00000.parquet")).to_pylist()


def in_order(source: Folder, cases: list[Case]) -> list[Case]:
    """The cases as the source's shard has them."""
    if source.table:
        return cases
    named = {case.name: case for case in cases}
    named |= {f"{Path(n).stem}.jpg": case for n, case in named.items() if n.endswith(".txt")}
    (shard,) = source.shards()
    return [named[name] for name, _ in shard.spec[3]]


def main() -> None:
    """`python -m tests.hostile.corpus HOME ROOT`: everything, and what it took, as JSON."""
    home, root = map(Path, sys.argv[1:])
    found = {}
    for which, cases in FOLDERS.items():
        source = write(home / which, which, cases)
        rows = run(source, Store(root / which))
        order = in_order(source, cases)
        found[which] = {
            c.name: (r["status"], r["error_message"]) for c, r in zip(order, rows, strict=True)
        }
    json.dump(
        {"verdicts": found, "peak_bytes": memory.peak()},
        io.TextIOWrapper(sys.stdout.buffer, "utf-8"),
    )


if __name__ == "__main__":
    main()

"""`python -m tests.hostile.make FOLDER` writes the corpus; without a folder it prints the table.

The bytes are functions of this code alone. Nothing of the corpus is in the repository.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.hostile import archives, captions, names, pictures, urls
from tests.hostile.case import Case

KINDS: Mapping[str, Sequence[Case]] = {
    "pictures": pictures.CASES,
    "captions": captions.CASES,
    "names": names.CASES,
    "archives": archives.CASES,
    "urls": urls.CASES,
}


def table() -> str:
    """The README's table: every case and its verdict."""
    lines = ["| | case | verdict | what it is |", "|---|---|---|---|"]
    for kind, cases in KINDS.items():
        lines += [
            f"| {kind} | `{c.name}` | {c.verdict} | {c.why} |".replace("\\", "\\\\") for c in cases
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    if len(sys.argv) == 1:
        print(table(), end="")
        return
    for kind, cases in KINDS.items():
        folder = Path(sys.argv[1], kind)
        folder.mkdir(parents=True)
        for case in cases:
            (folder / case.name).write_bytes(case.make())
    print(f"{sum(map(len, KINDS.values()))} cases in {sys.argv[1]}")


if __name__ == "__main__":
    main()

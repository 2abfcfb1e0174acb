"""`python -m tests.hostile.make FOLDER` writes the corpus; without a folder it prints README.md.

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
WHERE = {
    "pictures": "through the folder and the webdataset source",
    "captions": "text files beside good pictures, through the folder source",
    "names": "file names in a table, through the folder source",
    "archives": "through the webdataset source",
    "urls": "through the urls source",
}


def table() -> str:
    """README.md: every case and its verdict."""
    count = sum(map(len, KINDS.values()))
    lines = [
        "# Hostile inputs",
        "",
        f"{count} cases, made by `python -m tests.hostile.make FOLDER`; without one it prints",
        "this file. Verdicts: `sample`, a reason of a reject, or, of a whole archive, `error`: its",
        "shard fails, is tried again and reported, and nothing of it is used.",
        "",
    ]
    for kind, cases in KINDS.items():
        lines += [
            f"## {kind}: {WHERE[kind]}",
            "",
            "| case | verdict | what it is |",
            "|---|---|---|",
        ]
        rows = (f"| `{c.name}` | {c.verdict} | {c.why} |" for c in cases)
        lines += [row.replace("\\", "\\\\") for row in rows] + [""]
    return "\n".join(lines)


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

"""The convention of WebDataset: files of a sample share a name up to the first dot.

Some tars have names with further dots that belong to the sample ("photo.1.jpg", "photo.2.jpg"): to
webdataset these are fields "1.jpg" and "2.jpg" of one sample, "photo"; with `last` dots, as other
tools have it, they are two.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.sources.files import archives


@dataclass
class Sample:
    """Files of a tar that share a name up to the first dot, or the last one."""

    stem: str
    names: dict[str, str] = field(default_factory=dict)  # ending -> the member's whole name
    data: dict[str, bytes] = field(default_factory=dict)  # ending -> content, of those read
    refused: archives.Member | None = None  # the first that is: the whole sample goes
    crowded: bool = False  # several pictures "1.jpg", "2.jpg", …: their bytes are not kept


def samples(
    found: Iterable[archives.Member], last: bool = False, named: Container[str] = ()
) -> Iterator[Sample]:
    """Members to samples: those of one sample follow each other. A whole tar may be one, so nothing
    grows with it but names.

    Args:
        last: names end at the last dot.
        named: endings with dots that are wanted in any case.
    """
    sample: Sample | None = None
    seen: set[str] = set()
    for member in found:
        if archives.is_hidden(member.name):
            continue
        stem, ending = split_name(member.name, last)
        if sample is None or stem != sample.stem:
            if sample is not None:
                yield sample
            sample = Sample(stem)
            if stem in seen:
                detail = f"{member.name[:200]!r}: its sample's other files lie elsewhere in the tar"
                sample.refused = archives.Member(member.name, b"", "unsafe-member", detail)
            seen.add(stem)
        if member.reason:
            sample.refused = sample.refused or member
        elif ending in sample.names:
            detail = f"{member.name[:200]!r}: its sample has {sample.names[ending][:200]!r} as well"
            sample.refused = archives.Member(member.name, b"", "unsafe-member", detail)
        else:
            sample.names[ending] = member.name
            if member.data and (ending in named or not _crowds(sample, ending, named)):
                sample.data[ending] = member.data
    if sample is not None:
        yield sample


def split_name(name: str, last: bool = False) -> tuple[str, str]:
    """ "./a/b.c.JPG" -> ("a/b", "c.jpg"): the convention's key and ending; or ("a/b.c", "jpg")."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, ending = base.rpartition(".") if last else base.partition(".")
    if last and not dot:
        stem, ending = base, ""
    return folder + slash + stem, ending.lower()


def _crowds(sample: Sample, ending: str, named: Container[str]) -> bool:
    """Whether a file is one of many that a sample has of a kind: "2.jpg", or "2.txt" beside it."""
    if "." not in ending:
        return False
    others = [e for e in sample.data if "." in e and e not in named]
    if archives.is_picture(ending) and any(map(archives.is_picture, others)):
        sample.crowded = True
        for other in others:
            del sample.data[other]
    return sample.crowded

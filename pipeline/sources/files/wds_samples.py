"""The convention of WebDataset: files of a sample share a name up to the first dot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.sources.files import archives


@dataclass
class Sample:
    """Files of a tar that share a name up to the first dot."""

    stem: str
    names: dict[str, str] = field(default_factory=dict)  # ending -> the member's whole name
    data: dict[str, bytes] = field(default_factory=dict)  # ending -> content, of those read
    refused: archives.Member | None = None  # the first that is: the whole sample goes


def samples(found: Iterable[archives.Member]) -> Iterator[Sample]:
    """Members to samples: those of one sample follow each other."""
    sample: Sample | None = None
    seen: set[str] = set()
    for member in found:
        if archives.is_hidden(member.name):
            continue
        stem, ending = split_name(member.name)
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
            if member.data:
                sample.data[ending] = member.data
    if sample is not None:
        yield sample


def split_name(name: str) -> tuple[str, str]:
    """ "./a/b.c.JPG" -> ("a/b", "c.jpg"): the convention's key and ending."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()

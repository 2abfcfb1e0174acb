"""JourneyDB: 4.4 million Midjourney pictures with the prompts that made them, on the hub (gated).

A prompt is what was typed to an engine, options and picture links included; the caption is what is
left of it without them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import ClassVar, Literal

from pipeline.core.rules import Rules, readable
from pipeline.core.samples import InputShard, RawImage, Reject
from pipeline.sources.files import archives, transfer
from pipeline.sources.files.hosted import Hosted
from pipeline.sources.files.lookup import Row, rows_of, sorted_rows
from pipeline.sources.files.packed import pictures

#: Upstream's names of the annotations; "realease" is theirs.
ANNOTATIONS = {
    "train": "data/train/train_anno_realease_repath.jsonl.tgz",
    "valid": "data/valid/valid_anno_repath.jsonl.tgz",
}
ARCHIVES = 200  # 000.tgz to 199.tgz, of each split
MAX_LINE_BYTES = 1 << 20


class JourneyDB(Hosted):
    """Settings of the source."""

    rules: ClassVar[Rules] = Rules()

    base: str = "hf://datasets/JourneyDB/JourneyDB"
    splits: Literal["train", "valid", "train,valid"] = "train"  # "valid" is not trained on

    def shards(self) -> list[InputShard]:
        """An archive is a shard: 00000-00199 are train's, 00200-00399 valid's, as "val"."""
        return [
            InputShard(f"{start + n:05d}", split, (f"data/{upstream}/imgs/{n:03d}.tgz",))
            for upstream, split, start in (("train", "train", 0), ("valid", "val", ARCHIVES))
            for n in range(ARCHIVES)
            if upstream in self.splits.split(",")
        ]

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        """The archive's pictures in its order.

        Raises:
            TransferError, BrokenArchive: it cannot be had whole. SettingError: it needs leave.
        """
        (name,) = shard.spec
        number, split = int(PurePosixPath(name).stem), name.split("/")[1]
        annotations = self.url(ANNOTATIONS[split])
        with transfer.local(self.url(name)) as path:
            table = sorted_rows(
                f"journeydb {transfer.stamped(annotations)}",
                lambda: _annotated(annotations),
                span=1,
            )
            prompts: dict[str, str] = {}
            for row in rows_of(table, number, number):
                prompts.setdefault(row.name, row.caption)

            def describe(picture: str) -> str | tuple[str, str]:
                if picture not in prompts:
                    return "no-caption", f"{picture}: the annotations do not name it"
                caption = strip_flags(prompts[picture])
                return caption or ("no-caption", f"nothing is left of {prompts[picture][:80]!r}")

            yield from pictures(path, self.url(name), shard, describe, only, digits=5)

    def estimate(self, shard: InputShard) -> int:
        return self.samples(shard) * 130_000

    def samples(self, shard: InputShard) -> int:
        return 21_000 if shard.split == "train" else 1_200


def _annotated(url: str) -> Iterator[Row]:
    """(archive's number, picture's name, prompt) of every line that says them."""
    with (
        transfer.local(url) as path,
        archives.open_member(path, lambda name: name.endswith(".jsonl")) as lines,
    ):
        while line := lines.readline(MAX_LINE_BYTES):
            try:
                record = json.loads(line)
                where, prompt = record["img_path"], record["prompt"]
                folder, _, name = where.removeprefix("./").rpartition("/")
                number = int(PurePosixPath(folder).name)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # its picture is rejected as one that nobody has annotated
            if isinstance(prompt, str) and 0 <= number < ARCHIVES:
                yield Row(number, name, readable(prompt))


#: Midjourney's options. `--name` is one whatever its name; these are known after a dash that a
#: phone has made of the two hyphens, and where they follow a word without a space.
_OPTIONS = frozenset(
    """ar aspect v version q quality s stylize style c chaos w h width height no seed sameseed stop
    iw niji tile video hd beta upbeta uplight upanime creative test testp fast relax turbo vibe
    weird repeat r sref cref cw sw uplight newclip old raw draft profile p""".split()  # noqa: SIM905
)
_WORDS = frozenset(("raw", "cute", "scenic", "expressive", "original", "random", "default"))
_LINK = re.compile(r"<?https?://[^\s>]+>?", re.IGNORECASE)
_WEIGHT = re.compile(r"::\s?-?\d*\.?\d*(?=[\s,]|$)|::")
_HYPHENS = re.compile(r"(--|[—–]+-?)([A-Za-z]*)(.*)", re.DOTALL)
#: After a dash an option is one only with a value, before another one, or at the end: in
#: "a portrait—old man" and "a portrait — old man" it is a word.
_ENDS = r"\d|\s*$|\s+(?:[-—–.\d]|(?:%s)\b)" % "|".join(sorted(_WORDS))
_GLUED = re.compile(
    r"(?<=\S)(?:--(?=(?:%s)(?:[\s\d]|$))|—(?=no\s|(?:%s)(?:%s)))"
    % (*["|".join(sorted(_OPTIONS))] * 2, _ENDS),
    re.IGNORECASE,
)
_VALUE = re.compile(r"-?[\d.:x/,]+|[4][abc]", re.IGNORECASE)


def strip_flags(prompt: str) -> str:
    """A Midjourney prompt as a caption: no options (--ar 16:9, --v 5, --no people), no links to
    pictures, no weights (::2)."""
    text = _GLUED.sub(r" \g<0>", _LINK.sub(" ", prompt))
    kept: list[str] = []
    option = ""  # the one whose values may follow
    words = text.split()
    for place, word in enumerate(words):
        if name := _option(word, words[place + 1 : place + 3]):
            option = name
        elif word == option or (option and _is_value(word, option)):
            option = "" if word.lower() in _WORDS else option
        else:
            option = ""
            kept.append(word)
    text = " ".join(_WEIGHT.sub(" ", " ".join(kept)).split())
    return re.sub(r"\s+([,.;])", r"\1", text).strip(" ,;-—–")


def _option(word: str, following: list[str]) -> str:
    """The name of the option that a word begins, with one or two after it; "" if it begins none."""
    found = _HYPHENS.fullmatch(word)
    if found is None:
        return ""
    hyphens, name, rest = found.groups()
    if not name:  # "-- ar 16:9"
        return following[0] if not rest and _is_last(following) else ""
    glued = rest == "" or _VALUE.fullmatch(rest.lstrip("=:")) is not None
    if hyphens == "--":
        return name if glued or name.lower() in _OPTIONS else ""
    return name if glued and _is_last([name + rest.rstrip(","), *following]) else ""


def _is_last(words: list[str]) -> bool:
    """Whether the first of these words is an option, and nothing but its value may follow."""
    found = re.match("[a-z]*", words[0].lower()) if words else None
    if found is None or found[0] not in _OPTIONS:
        return False
    rest = " ".join([words[0][found.end() :], *words[1:2]])
    return found[0] == "no" or re.match(_ENDS, rest, re.IGNORECASE) is not None


def _is_value(word: str, option: str) -> bool:
    """Whether a word after an option belongs to it; of --no, all up to the next one."""
    if option.lower() == "no":
        return True
    return _VALUE.fullmatch(word) is not None or word.lower() in _WORDS

"""Captions made fit to train with: alt texts cleaned, a model's habits trimmed, one line each.

All three are idempotent and take any Unicode; the tables with an example each are in clean_rules.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from captioning.clean_rules import HABITS, RULES, Rule

PASSES = 12  # a real caption settles in two; what does not in these is no text
MAX_CHARACTERS = 10_000  # the rest of a longer one is cut off


def clean(text: str, lower: bool = True) -> str:
    """An alt text without links, HTML, names of files, codes and advertising; "" where that was
    all of it.

    Args:
        lower: as the official code has it; False keeps the case.
    """
    rules = [rule for rule in RULES if lower or rule.pattern is not str.lower]
    return _settled(one_line(text[:MAX_CHARACTERS]), rules)


def trim_habits(text: str) -> str:
    """A model's caption without "The image features …" and the like; its case is kept."""
    line = one_line(text)
    trimmed = _settled(line, HABITS)
    if trimmed != line:
        return trimmed[:1].upper() + trimmed[1:]
    return line


def is_refusal(text: str) -> bool:
    """Whether a model says that it will not or cannot describe the picture."""
    return _REFUSAL.match(one_line(text)) is not None


def one_line(text: str) -> str:
    """Without control characters and halves of surrogate pairs (which no UTF-8 can hold), white
    space as single spaces, none at the ends."""
    text = _NO_TEXT.sub(" ", text)
    return " ".join(text.split())


def _settled(text: str, rules: Sequence[Rule]) -> str:
    """The text after as many passes over the rules as change it: then one more changes nothing."""
    for _ in range(PASSES):
        before = text
        for rule in rules:
            text = rule.apply(text)
        text = one_line(text)
        if text == before:
            return text
    return ""


_REFUSAL = re.compile(
    r"(?:(?:i['’]m|i am|we['’]re|we are) (?:very |really )?(?:sorry|unable|afraid|not able)\b"
    r"|sorry,|sorry but |i apologi[sz]e\b|my apologies\b"
    r"|(?:unfortunately, )?i (?:can(?:['’]t|not)|can not|won['’]t|do not|don['’]t)\b"
    r"|as an ai\b)",
    re.IGNORECASE,
)
_NO_TEXT = re.compile(
    "[%s]"
    % "".join(
        re.escape(chr(code))
        for code in range(0x10000)
        if unicodedata.category(chr(code)) in ("Cc", "Cs") or code in (0xFEFF, 0xFFFE, 0xFFFF)
    )
)

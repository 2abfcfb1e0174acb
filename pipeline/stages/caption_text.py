"""From what a captioner wrote to what is kept: one line each, cleaned as asked, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from captioning import Caption
from captioning.answer import answer
from captioning.clean import clean, is_refusal, one_line, trim_habits
from pipeline.core.errors import SettingError, nearest

#: Step of `--clean` -> what it does, in the order in which they are done.
STEPS = {
    "habits": trim_habits,
    "rules": lambda text: clean(text, lower=False),
    "lower": str.lower,
}

#: Upper ends of the histogram of lengths, in words.
WORDS = (10, 20, 40, 80, 160)


@dataclass(frozen=True)
class Refused:
    """A picture of whose captions none is kept."""

    reason: str  # "empty", "refused" or "no-caption"
    detail: str


def parse_steps(text: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """ "habits,lower" -> the steps in order.

    Raises:
        SettingError: an unknown step.
    """
    given = [part.strip() for part in (text.split(",") if isinstance(text, str) else text)]
    for step in filter(None, given):
        if step not in STEPS:
            raise SettingError(
                f"clean={step}: unknown{nearest(step, STEPS)}; known: {', '.join(STEPS)}"
            )
    return tuple(step for step in STEPS if step in given)


def finish(
    captions: list[Caption], steps: tuple[str, ...], counters: Counter[str]
) -> list[Caption] | Refused:
    """A picture's captions as they are kept: out of what a model wraps them in; without empty
    ones, refusals, and texts that are no captions, which are counted."""
    kept, refused, odd = [], "", ""
    for caption in captions:
        said = one_line(caption.text)
        text = answer(caption.text)
        if is_refusal(text):
            counters["refusals"] += 1
            refused = text
            continue
        if said and not text:
            counters["no captions"] += 1
            odd = said
            continue
        if text != said:
            counters["unwrapped"] += 1
        for step in steps:
            text = STEPS[step](text)
        if not text:
            counters["empty"] += 1
            continue
        kept.append(replace(caption, text=text))
        counters["truncated"] += caption.finish_reason == "length"
    if kept:
        return kept
    if refused:
        return Refused("refused", f"the captioner said {refused[:80]!r}")
    if odd:
        return Refused("no-caption", f"no caption is in {odd[:80]!r}")
    return Refused("empty", "nothing is left of what the captioner wrote")


def no_caption(text: str) -> bool:
    """Whether earlier versions kept a text that is no caption as it stands."""
    return answer(text) != text


def summarise(captions: Iterable[Caption]) -> Counter[str]:
    """Counts of a shard's captions: how many, their tokens, texts that were there before, and
    lengths by `words_up_to`."""
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    for caption in captions:
        counts["captions"] += 1
        counts["tokens"] += caption.tokens or 0
        counts["duplicates"] += caption.text in seen
        counts[words_up_to(caption.text)] += 1
        seen.add(caption.text)
    return +counts


def words_up_to(text: str) -> str:
    """ "words 1-10", …, "words over 160": the text's place in the histogram."""
    words, low = len(text.split()), 1
    for high in WORDS:
        if words <= high:
            return f"words {low}-{high}"
        low = high + 1
    return f"words over {WORDS[-1]}"


def histogram(counters: Counter[str]) -> dict[str, int]:
    """The histogram out of a run's counters, shortest first."""
    names = [words_up_to("w " * high) for high in (*WORDS, WORDS[-1] + 1)]
    return {name.removeprefix("words "): counters[name] for name in names}


def facts(counters: Counter[str], seconds: float) -> str:
    """ "1,200 captions (34/s), 60,000 tokens (1,700/s), 3 truncated, …": what a run counted."""
    rates = []
    for name in ("captions", "tokens"):
        if counters[name]:
            rate = f" ({counters[name] / seconds:,.1f}/s)" if seconds else ""
            rates.append(f"{counters[name]:,} {name}{rate}")
    others = ("truncated", "duplicates", "empty", "refusals", "no captions", "unwrapped")
    return ", ".join([*rates, *(f"{counters[name]:,} {name}" for name in others if counters[name])])

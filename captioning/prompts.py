"""What captioners are asked: the texts of prompts.yaml by name, or a text of the user's own."""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

import yaml

IMAGE = "<image>"  # the slot in a raw prompt, which is used as it stands


@dataclass(frozen=True)
class Prompt:
    """A question to a model about a picture.

    A text with IMAGE in it is raw: it is the model's whole input, special words of its format
    included. Any other becomes a user's turn in the model's own chat format, after the picture.
    """

    label: str  # its name, or "prompt-" and 8 hex digits of its text
    text: str
    named: bool = False

    @property
    def raw(self) -> bool:
        return IMAGE in self.text


@functools.cache
def named() -> dict[str, str]:
    """Name -> text, of prompts.yaml."""
    table = yaml.safe_load((files("captioning") / "prompts.yaml").read_text("utf-8"))
    return {name: " ".join(text.split()) for name, text in table.items()}


@functools.cache
def find_prompts(prompt: str) -> tuple[Prompt, ...]:
    """ "long", "long,short" or a text. A text has a space in it (or IMAGE); a name has none.

    Raises:
        ValueError: it is empty, has several slots, is no known name, or names one twice; one line.
    """
    text = prompt.strip()
    if not text:
        raise ValueError(f"prompt={prompt!r}: empty; name one of {', '.join(named())}, or a text")
    if (re.search(r"\s", text) is None and IMAGE not in text) or _all_named(text):
        names = [part.strip() for part in text.split(",")]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"prompt={_short(text)}: {name} is there twice; name it once")
        return tuple(map(_named, names))
    if text.count(IMAGE) > 1:
        raise ValueError(f"prompt={_short(text)}: has several {IMAGE} slots; leave one")
    return (Prompt(f"prompt-{hashlib.sha256(text.encode()).hexdigest()[:8]}", text),)


def _all_named(text: str) -> bool:
    return all(part.strip() in named() for part in text.split(","))


def _named(name: str) -> Prompt:
    if name not in named():
        match = difflib.get_close_matches(name, named(), n=1, cutoff=0.5)
        hint = f'; did you mean "{match[0]}"?' if match else ""
        raise ValueError(
            f"prompt={_short(name)}: unknown{hint}; known: {', '.join(named())}; a prompt of your "
            "own has more than one word"
        )
    return Prompt(name, named()[name], named=True)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."

"""What a captioner is: keyed pictures in, captions or failures out, and the settings all share."""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from PIL import Image

from captioning.answer import answer as caption_in
from captioning.prompts import Prompt, find_prompts
from pipeline.core import images


class BadSetting(ValueError):
    """A setting that cannot be used: one line with its name, its value and a remedy."""


class BadPicture(Exception):
    """A picture that cannot be captioned: `reason` groups it, the message says what happened."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """One picture to caption; nothing is decoded before the captioner asks for it."""

    key: str  # with the seed, all that a caption's noise depends on
    open: Callable[[], Image.Image]  # upright RGB; any thread may call it; raises BadPicture
    #: The encoded file, e.g. a JPEG, where any reader sees in it what `open` gives.
    data: bytes | None = None
    size: tuple[int, int] | None = None  # width, height, where they are known: a hint for planning


@dataclass(frozen=True)
class Caption:
    """One sentence about one picture, and what wrote it."""

    text: str
    captioner: str  # Captioner.name
    revision: str  # changes when the captioner's output changes
    prompt: str = ""  # what the captioner was asked; "" for one that takes no prompt
    tokens: int | None = None  # of the text, without end-of-text; None where nobody counted
    finish_reason: str | None = None  # "stop", "length" (max_tokens reached), None if unknown
    best_effort: bool = False  # the same (seed, key) may give another text next time
    number: int = 0  # 0 … num_captions - 1 of its picture


@dataclass(frozen=True)
class Failure:
    """A picture without captions. It concerns this picture alone."""

    reason: str  # a short class of causes, e.g. "undecodable"; summaries group by it
    detail: str  # what exactly happened; never a key, a token or a whole URL


#: A picture's key, and its captions in order of number (num_captions of them), or why it has none.
Answer = tuple[str, "list[Caption] | Failure"]


@dataclass(frozen=True)
class Settings:
    """What every captioner is told; a captioner's own settings are a subclass.

    Raises:
        BadSetting: a value that cannot be used.
    """

    prompt: str = "long"  # a name of prompts.yaml, several ("long,short"), or a text
    num_captions: int | None = None  # a picture; None: one for each prompt
    temperature: float = 0.0  # 0: greedy
    max_tokens: int = 256  # of a caption
    seed: int = 0  # of the noise at a temperature, with the picture's key

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise BadSetting(f"temperature={self.temperature}: use 0 (greedy) or more")
        if self.max_tokens < 1:
            raise BadSetting(f"max_tokens={self.max_tokens}: use 1 or more")
        prompts = len(self.prompts)
        number = self.number
        if number < 1:
            raise BadSetting(f"num_captions={number}: use 1 or more")
        if number < prompts:
            raise BadSetting(
                f"num_captions={number}: there are {prompts} prompts in prompt={self.prompt}; "
                f"use {prompts} or more"
            )
        if number > prompts and self.temperature == 0:
            raise BadSetting(
                f"num_captions={number}: at temperature 0 a prompt gives one caption; give a "
                "temperature, e.g. 0.7, or as many prompts, e.g. prompt=long,short"
            )

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts, resolved."""
        try:
            return find_prompts(self.prompt)
        except ValueError as error:
            raise BadSetting(str(error)) from error

    @property
    def number(self) -> int:
        """Captions a picture."""
        return len(self.prompts) if self.num_captions is None else self.num_captions

    def prompt_of(self, number: int) -> Prompt:
        """The prompt of a picture's caption `number`: they take turns."""
        return self.prompts[number % len(self.prompts)]

    def asked(self) -> str:
        """The prompt as it may be given again: names, or the text."""
        first = self.prompts[0]
        return ",".join(prompt.label for prompt in self.prompts) if first.named else first.text

    def decisive(self) -> dict[str, Any]:
        """What decides a caption's text: part of its shard's fingerprint."""
        return {
            "prompt": self.asked(),
            "prompts": [prompt.text for prompt in self.prompts],
            "num_captions": self.number,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed if self.temperature else None,
        }

    def kind(self) -> str:
        """What is not the default, for the name of what is written: ".short.n3.t0.7", or ""."""
        parts = []
        if self.prompts != find_prompts(Settings.prompt):
            parts += [prompt.label for prompt in self.prompts]
        if self.number != len(self.prompts):
            parts.append(f"n{self.number}")
        if self.temperature:
            parts.append(f"t{self.temperature:g}")
        return "".join(f".{part}" for part in parts)

    def noise_seed(self, key: str, number: int) -> int:
        """63 bits for the noise of one caption: a function of (seed, key, number) alone."""
        digest = hashlib.sha256(f"caption:{self.seed}:{key}:{number}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


class Captioner(ABC):
    """Cheap to make and to pickle: weights and connections come with the first picture.

    `load` makes one with a name and an object of its `Settings`.
    """

    Settings: ClassVar[type[Any]] = Settings
    gpus: float = 0.0  # that a worker with this captioner holds
    workers: int | None = None  # where nobody says how many; None: as many as there is room for
    best_effort: bool = False  # the same (seed, key) may give another text next time

    def __init__(self, name: str, settings: Any) -> None:
        self.name = name  # the parquet's column `captioner`
        self.settings = settings
        #: What happened since the caller last looked and cleared, for a run's report. Names that
        #: begin with "ms " hold milliseconds.
        self.counters: Counter[str] = Counter()

    @property
    @abstractmethod
    def revision(self) -> str:
        """Changes when the output changes: a commit of the hub, a hash of the weights.

        Raises:
            BadSetting: the model is not there.
        """

    @abstractmethod
    def caption(self, pictures: Iterable[Picture]) -> Iterator[Answer]:
        """An answer for each picture, in any order, each as soon as it is there.

        Takes pictures as it has room for them: a bounded number ahead of its answers. A text does
        not depend on which other pictures there are, up to floating point. Threads and connections
        end with the iterator.

        Raises:
            BadSetting: nothing can be captioned: no weights, no server, a prompt without a slot.
        """

    def decisive(self) -> dict[str, Any]:
        """What decides the captions' bytes beside the pictures, name and revision."""
        return self.settings.decisive()

    def label(self) -> str:
        """The name under which its captions are kept: two that differ on purpose do not share
        one. "llava-1.5-7b", "llava-1.5-7b.short"."""
        return f"{self.name}{self.settings.kind()}"

    @contextlib.contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """Counts the milliseconds that its block takes."""
        started = time.perf_counter()
        yield
        self.counters[f"ms {what}"] += math.ceil(1000 * (time.perf_counter() - started))

    def __call__(self, images: Sequence[Image.Image]) -> list[Caption]:
        """The captions of pictures in order, `num_captions` each, upright and on white. Their keys
        are "0", "1", …

        Raises:
            BadPicture: one cannot be captioned; `caption` tells each picture's failure apart.
        """
        keyed = {str(number): image for number, image in enumerate(images)}
        lock = threading.Lock()  # Pillow reads a file when its pixels are first asked for
        pictures = (Picture(k, _opened(image, lock), size=image.size) for k, image in keyed.items())
        answers = dict(self.caption(pictures))
        captions: list[Caption] = []
        for key in keyed:
            answer = answers[key]
            if isinstance(answer, Failure):
                raise BadPicture(answer.reason, f"picture {key}: {answer.detail}")
            captions += [replace(caption, text=caption_in(caption.text)) for caption in answer]
        return captions


def _opened(image: Image.Image, lock: threading.Lock) -> Callable[[], Image.Image]:
    def opened() -> Image.Image:
        try:
            with lock:
                return images.upright(image)
        except images.BadPicture as error:
            raise BadPicture(error.reason, str(error)) from error

    return opened

"""Captions from a vision-language model in this process: LLaVA, or what transformers' auto class
for image-text-to-text loads."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from captioning.captioner import Answer, BadSetting, Caption, Captioner, Failure, Picture
from captioning.vlm import hub
from captioning.vlm.settings import Settings, Wanted

if TYPE_CHECKING:
    from captioning.vlm.model import Model, Prepared

#: Name in captioning.CAPTIONERS -> hub repo.
MODELS = {
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.6-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
}

WINDOW = 8  # batches whose prompts are sorted by length together
AHEAD = 2  # batches that are prepared while the model generates


class VisionLanguageModel(Captioner):
    """Captions in batches: prompts of like length together, the next batch prepared in a thread
    while the model writes this one, an out-of-memory halved. The weights load with the first batch.
    """

    Settings = Settings

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings)
        self.settings: Settings = settings
        self.gpus = 1.0 if settings.device == "cuda" else 0.0
        self._model: Model | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights: a worker loads its own."""
        return {**self.__dict__, "_model": None}

    @functools.cached_property
    def revision(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        folder, commit = self._folder()
        return commit or hub.files_hash(folder)

    def caption(self, pictures: Iterable[Picture]) -> Iterator[Answer]:
        pending: dict[str, dict[int, Caption]] = {}
        failed: dict[str, Failure] = {}
        with ThreadPoolExecutor(AHEAD, "prepare") as pool:
            for prepared in _ahead(self._batches(pictures), self._prepare, pool):
                for wanted, answer in self._write(prepared):
                    key = wanted.picture.key
                    if isinstance(answer, Failure):
                        pending.pop(key, None)
                        if failed.setdefault(key, answer) is answer:
                            yield key, answer
                    elif key not in failed:
                        done = pending.setdefault(key, {})
                        done[wanted.number] = answer
                        if len(done) == self.settings.number:
                            del pending[key]
                            yield key, [done[number] for number in sorted(done)]

    def _folder(self) -> tuple[Any, str]:
        return hub.model_folder(self.name, MODELS.get(self.name, self.name))

    @property
    def model(self) -> Model:
        if self._model is None:
            from captioning.vlm.model import Model

            folder, commit = self._folder()
            if commit and commit != self.revision:  # that of the machine which planned
                raise BadSetting(
                    f"captioner={self.name}: the hub cache of this machine has {commit}, the run "
                    f"began with {self.revision}; run `pipeline fetch {self.name}` on each, or "
                    "name the commit, owner/name@commit"
                )
            self._model = Model(self.name, folder, self.settings)
            self.counters[f"loaded captioner {self.name}"] += 1
        return self._model

    def _batches(self, pictures: Iterable[Picture]) -> Iterator[list[Wanted]]:
        """The captions to write, WINDOW batches of them sorted by their prompts' length and cut."""
        settings, pictures = self.settings, iter(pictures)
        whole = WINDOW * settings.batch  # captions; a picture's are all in one window
        while window := list(itertools.islice(pictures, max(1, whole // settings.number))):
            rows = [Wanted(picture, n) for picture in window for n in range(settings.number)]
            rows.sort(key=lambda w: self.model.length(w.picture.size, w.number))
            for start in range(0, len(rows), settings.batch):
                yield rows[start : start + settings.batch]

    def _prepare(self, rows: list[Wanted]) -> tuple[Prepared, list[tuple[Wanted, Failure]]]:
        """Opens and preprocesses a batch; in a thread of its own."""
        with self.spent("prepare"):
            return self.model.prepare(rows)

    def _write(
        self, prepared: tuple[Prepared, list[tuple[Wanted, Failure]]]
    ) -> Iterator[tuple[Wanted, Caption | Failure]]:
        """The captions of a prepared batch; out of memory, in halves."""
        batch, failures = prepared
        yield from failures
        if not batch.rows:
            return
        with self.spent("generate"):
            written = self.model.generate(batch)
        if written is not None:
            for wanted, (text, tokens, reason) in zip(batch.rows, written, strict=True):
                number, (name, revision) = wanted.number, (self.name, self.revision)
                prompt = self.settings.prompt_of(number).text
                yield wanted, Caption(text, name, revision, prompt, tokens, reason, number=number)
            return
        if len(batch.rows) == 1:
            raise BadSetting(
                f"captioner={self.name}: out of memory with one picture; use a GPU with more, a "
                f"smaller model or a lower max_tokens than {self.settings.max_tokens}"
            )
        self.counters["split, out of memory"] += 1
        half = len(batch.rows) // 2
        for part in (batch.rows[:half], batch.rows[half:]):
            yield from self._write(self._prepare(part))


def _ahead(
    batches: Iterator[list[Wanted]],
    prepare: Callable[[list[Wanted]], Any],
    pool: ThreadPoolExecutor,
) -> Iterator[Any]:
    """Prepared batches in order, AHEAD of them under way while the caller uses one."""
    queue: collections.deque[Future[Any]] = collections.deque()
    for batch in batches:
        queue.append(pool.submit(prepare, batch))
        if len(queue) > AHEAD:
            yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()

"""A vision-language model of transformers with its processor: batches of pictures to texts."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from captioning.captioner import BadPicture, BadSetting, Failure
from captioning.prompts import IMAGE, Prompt
from captioning.vlm.settings import Settings, Wanted

MAX_SIDE = 4096  # pixels; no model looks at more, and a batch of larger ones would fill the memory
MAX_ASPECT = 100  # a processor that sets the shorter side to 336 makes a line endless

Written = tuple[str, int, str]  # text, its tokens, finish_reason


@dataclass
class Prepared:
    """A batch as the model takes it."""

    rows: list[Wanted]
    inputs: Any  # transformers' BatchFeature on the CPU; None without rows


class Model:
    """Weights and processor in memory.

    Raises:
        BadSetting: transformers cannot load the folder as an image-text-to-text model, there is
            no such device, its memory is too small, or a prompt has no place for the picture.
    """

    def __init__(self, name: str, folder: Path, settings: Settings) -> None:
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise BadSetting("device=cuda: torch sees no GPU here; use device=cpu")
        if settings.device == "cpu" and settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.name, self.settings = name, settings
        self.processor, self.model = _load(name, folder, settings)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # so that every row's text begins at one place
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.decoder = copy.deepcopy(self.tokenizer)  # the other is a thread's that prepares
        self.turn = threading.Lock()  # of the processor: a fast tokenizer is one thread's at a time
        self.ends = _ends(self.model, self.tokenizer)
        self.texts = [self._render(settings.prompt_of(n)) for n in range(settings.number)]
        self.lengths = [len(self._tokenizer_ids(text)) for text in self.texts]

    def length(self, size: tuple[int, int] | None, number: int) -> int:
        """Tokens of a prompt with its picture, as far as they can be told without looking: what
        batches are sorted by, so that an error costs time alone."""
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if size is None or count is None or max(size) > MAX_ASPECT * min(size):
            return self.lengths[number]
        width, height = size
        try:
            return self.lengths[number] + count(image_sizes=[(height, width)]).num_image_tokens[0]
        except Exception:  # LLaVA's asks for a size of crops, which SigLIP's pictures have not
            return self.lengths[number]

    def prepare(self, rows: list[Wanted]) -> tuple[Prepared, list[tuple[Wanted, Failure]]]:
        """Opens and preprocesses the pictures; those that cannot be used come back as failures."""
        good: list[tuple[Wanted, Image.Image]] = []
        failures: list[tuple[Wanted, Failure]] = []
        for wanted in rows:
            try:
                good.append((wanted, _open(wanted)))
            except BadPicture as error:
                failures.append((wanted, Failure(error.reason, str(error))))
        inputs = self._inputs(good) if good else None
        if isinstance(inputs, Exception):  # it may be one picture's fault
            tried = [(one, self._inputs([one])) for one in good]
            failures += [(w, _unusable(e)) for (w, _), e in tried if isinstance(e, Exception)]
            good = [one for one, found in tried if not isinstance(found, Exception)]
            inputs = self._inputs(good) if good else None
            if isinstance(inputs, Exception):
                raise inputs
        return Prepared([wanted for wanted, _ in good], inputs), failures

    def generate(self, batch: Prepared) -> list[Written] | None:
        """Text, tokens and finish_reason of each row; None where memory does not suffice."""
        settings = self.settings
        noise = LogitsProcessorList()
        if settings.temperature:
            seeds = [settings.noise_seed(w.picture.key, w.number) for w in batch.rows]
            noise.append(GumbelNoise(settings.temperature, seeds))
        try:
            with torch.inference_mode():
                inputs = batch.inputs.to(self.model.device, self.model.dtype)
                found = self.model.generate(
                    **inputs,
                    generation_config=self._generation(),
                    use_model_defaults=False,
                    logits_processor=noise,
                )
            ids = found[:, inputs["input_ids"].shape[1] :].tolist()
        except torch.OutOfMemoryError:
            ids = None
        if ids is None:  # out of the except block: its traceback holds what fills the memory
            torch.cuda.empty_cache()
            return None
        return [self._written(row) for row in ids]

    def _generation(self) -> GenerationConfig:
        """Greedy, as the settings say and not as the folder's generation_config.json: the noise of
        a temperature comes with the scores."""
        return GenerationConfig(
            max_new_tokens=self.settings.max_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
        )

    def _written(self, ids: list[int]) -> Written:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        kept = ids[:end]
        text = self.decoder.decode(kept, skip_special_tokens=True).strip()
        return text, len(kept), "length" if end is None else "stop"

    def _inputs(self, rows: Sequence[tuple[Wanted, Image.Image]]) -> Any:
        """The processor's batch, or the exception it raised."""
        texts = [self.texts[wanted.number] for wanted, _ in rows]
        images = [[image] for _, image in rows]
        try:
            with self.turn:
                return self.processor(
                    images=images,
                    text=texts,
                    padding=True,
                    return_tensors="pt",
                    add_special_tokens=self._adds_special(texts[0]),
                )
        except (ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError) as error:
            return error

    def _tokenizer_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=self._adds_special(text))["input_ids"]

    def _adds_special(self, text: str) -> bool:
        """Whether the tokenizer is to add what a prompt begins with: not where a template has."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def _render(self, prompt: Prompt) -> str:
        """The model's input for a prompt, with one slot for the picture."""
        slot = getattr(self.processor, "image_token", None) or IMAGE
        if prompt.raw:
            return prompt.text.replace(IMAGE, slot)
        remedy = (
            f"write a raw prompt with the slot {IMAGE} in the model's own format, e.g. "
            f'"USER: {IMAGE} Describe the picture. ASSISTANT:"'
        )
        if not getattr(self.processor, "chat_template", None):
            raise BadSetting(
                f"prompt={prompt.label}: captioner={self.name} has no chat template to put the "
                f"picture into the prompt; {remedy}"
            )
        text = {"type": "text", "text": prompt.text}
        try:
            with_slot, without = (
                self.processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
                for content in ([{"type": "image"}, text], [text])
            )
        except Exception as error:  # a template is a program of the folder's
            raise BadSetting(
                f"prompt={prompt.label}: the chat template of captioner={self.name} takes no "
                f"picture and text: {_first_line(error)}; {remedy}"
            ) from error
        if with_slot == without:
            raise BadSetting(
                f"prompt={prompt.label}: the chat template of captioner={self.name} has no slot "
                f"for a picture; {remedy}"
            )
        return with_slot


class GumbelNoise(LogitsProcessor):
    """Sampling at a temperature as an argmax: scores / temperature + Gumbel noise (Maddison et al.
    2014, arXiv 1411.0030), each row's from a generator of its own. So a text does not depend on
    the batch that it is written in.

    Args:
        seeds: one a row.
    """

    def __init__(self, temperature: float, seeds: list[int]) -> None:
        self.temperature, self.seeds = temperature, seeds
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) scores -> float32 of that shape."""
        if not self.generators:
            device = scores.device
            self.generators = [torch.Generator(device).manual_seed(seed) for seed in self.seeds]
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        smallest = torch.finfo(torch.float32).tiny
        return scores.float() / self.temperature - noise.clamp_min_(smallest).log_()


def _open(wanted: Wanted) -> Image.Image:
    image = wanted.picture.open()
    longer, shorter = max(image.size), min(image.size)
    if longer > MAX_ASPECT * shorter:
        raise BadPicture(
            "aspect-ratio", f"{image.width}x{image.height} is longer than {MAX_ASPECT} to 1"
        )
    if longer > MAX_SIDE:
        return ImageOps.contain(image, (MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    return image


def _unusable(error: Exception) -> Failure:
    return Failure("unprocessable", f"{type(error).__name__}: {_first_line(error)}")


def _load(name: str, folder: Path, settings: Settings) -> tuple[Any, Any]:
    """(processor, model in eval mode on its device)."""
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, use_fast=True)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, settings.compute_dtype),
            local_files_only=True,
            use_safetensors=True,
        )
    except Exception as error:  # whatever it, safetensors and tokenizers make of half a file
        raise BadSetting(
            f"captioner={name}: transformers cannot load {folder} as an image-text-to-text model: "
            f"{_first_line(error)}"
        ) from error
    if getattr(processor, "tokenizer", None) is None:
        raise BadSetting(f"captioner={name}: {folder} has no processor of pictures and text")
    try:
        return processor, model.eval().to(settings.device)
    except torch.OutOfMemoryError as error:
        raise BadSetting(
            f"captioner={name}: its weights do not fit into what is free on "
            f"device={settings.device}: {_first_line(error)}; use a GPU with more, a smaller model"
        ) from error


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text, by the folder's generation config and its tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is not None:
        ends = [*ends, tokenizer.eos_token_id]
    return sorted(set(ends))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]

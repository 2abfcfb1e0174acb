"""Sheets of pictures painted while training, always from the same prompts and noise.

The decoder is loaded when the first sheet is due, on the first rank, and is no part of the model or
of a checkpoint. A sheet that fails, for want of memory or of the decoder's weights, is counted and
said, and training goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Callback, Logger, State
from composer.core.precision import get_precision_context
from composer.utils import dist
from torch import Tensor

from pipeline.core.errors import SettingError
from pipeline.core.latents import to_raw
from pipeline.core.manifest import TextFacts, mismatches
from training.config.settings import Samples
from training.data.token_vectors import Caption
from training.objectives.sampler import TextConditioned, sample
from training.observe.eval_context import EvalContext
from training.observe.image_grid import contact_sheet
from training.optim.ema import swap_weights
from training.optim.parallel import for_sampling
from training.randomness import picture_noise


class SampleSheets(Callback):
    """Every N steps and at the end of a stage; a file a sheet, and an image to the loggers.

    All ranks paint, since weights in parts need them all; the first decodes. The first average
    paints where there is one, else the live weights. What fails while weights in parts are gathered
    ends the run: other ranks wait for this one's.

    Args:
        captions: gives the prompts with their token vectors; called when the first sheet is due.
        path: step -> file.
        credit: attributions, for the sheet's footer.
    """

    def __init__(
        self,
        context: EvalContext,
        settings: Samples,
        captions: Callable[[], list[Caption]],
        path: Callable[[int], Path],
        credit: list[str],
    ) -> None:
        self.failed = 0
        self._context = context
        self._model = context.model
        self._settings = settings
        self._read = captions
        self._captions: list[Caption] | None = None
        self._decoder: Any = None
        self._path = path
        self._credit = credit
        self._gathering = False

    def batch_end(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        if not self._context.due(step, self._settings.every):
            return
        with self._context.meter.paused():
            try:
                self._paint(state, logger, step)
            except Exception as error:
                if self._gathering:
                    raise
                # Pictures are for the eye; a run of days is not to end for them.
                self.failed += 1
                text = " ".join(str(error).split())[:200]
                self._context.say(step, f"no samples ({self.failed} failed so far): {text}")
                self._context.metrics.report(step, {"samples/failed": self.failed}, logger)

    def _paint(self, state: State, logger: Logger, step: int) -> None:
        if self._captions is None:
            self._captions = self._read()
        averages = self._context.averages()
        name = next(iter(averages), "live")
        network = for_sampling(self._model.dit)
        self._gathering = network is not self._model.dit
        with swap_weights(self._model.dit, averages[name]) if averages else nullcontext():
            latents = self._latents(state, self._captions, network)
        self._gathering = False
        if dist.get_global_rank() > 0:
            return
        if not latents.isfinite().all():  # they would be decoded to black
            guidance = self._settings.guidance
            raise SettingError(f"samples.guidance={guidance:g}: latents are no numbers; lower it")
        pictures = self._decode(latents)
        texts = [caption.text for caption in self._captions]
        cells = [(text, [picture]) for text, picture in zip(texts, pictures, strict=True)]
        made = f"step {step}, {name} weights, guidance {self._settings.guidance:g}"
        sheet = contact_sheet(cells, footer="; ".join([made, *self._credit]))
        path = self._path(step)
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        sheet.save(part, "PNG")
        part.replace(path)
        image = np.asarray(sheet)
        logger.log_images(image, "samples", channels_last=True, step=step, use_table=False)

    def _latents(self, state: State, captions: list[Caption], network: TextConditioned) -> Tensor:
        """Painted ones (N, C, S, S), on the model's device."""
        config, device = self._model.dit.config, next(self._model.parameters()).device
        shape = (config.in_channels, config.input_size, config.input_size)
        noise = picture_noise(self._settings.seed, range(len(captions)), shape)
        y, y_mask = stack([caption.tokens for caption in captions], self._context.trimmed)
        size = min(self._context.batch_size, len(captions))
        found = []
        for first in range(0, len(captions), size):
            # Compiled code has a graph for each size of a batch: the last one is filled up with
            # pictures that are there already.
            start = min(first, len(captions) - size)
            part = slice(start, start + size)
            with get_precision_context(state.precision, state.precision_config):
                latents = sample(
                    network,
                    self._model.objective.denoiser,
                    noise[part].to(device),
                    y[part].to(device),
                    None if y_mask is None else y_mask[part].to(device),
                    steps=self._settings.steps,
                    guidance=self._settings.guidance,
                )
            found.append(latents[first - start :].float())
        return torch.cat(found)

    def _decode(self, latents: Tensor) -> np.ndarray:
        if self._decoder is None:
            from pipeline.encoders import load_vae

            decoder = load_vae(self._context.vae.name, str(latents.device))
            lines = mismatches(self._context.vae, decoder.facts, ignore=("revision", "dtype"))
            if lines:
                raise SettingError(f"vae {self._context.vae.name} has changed: {'; '.join(lines)}")
            self._decoder = decoder
        raw = to_raw(latents, self._context.vae)
        parts = raw.split(self._context.batch_size)
        return np.concatenate([self._decoder.decode(part) for part in parts])


def encode(prompts: list[str], text: TextFacts, trimmed: bool) -> list[Caption]:
    """Prompts with their token vectors, as shards store them; the encoder is loaded and let go.

    Raises:
        SettingError: its weights are not there, or not those that made the shards.
    """
    from pipeline.encoders import load_text

    encoder = load_text(text.name)
    lines = mismatches(text, encoder.facts, ignore=("revision", "dtype"))
    if lines:
        raise SettingError(f"text encoder {text.name} has changed: {'; '.join(lines)}")
    tokens, lengths = encoder.encode(prompts)
    rows = [int(length) if trimmed else tokens.shape[1] for length in lengths]
    vectors = [own[:count].half().numpy() for own, count in zip(tokens, rows, strict=True)]
    return [Caption(prompt, own) for prompt, own in zip(prompts, vectors, strict=True)]


def distinct(captions: list[Caption], count: int) -> list[Caption]:
    """The first `count` of different texts."""
    found: dict[str, Caption] = {}
    for caption in captions:
        found.setdefault(caption.text, caption)
    return list(found.values())[:count]


def stack(tokens: list[np.ndarray], trimmed: bool) -> tuple[Tensor, Tensor | None]:
    """Token vectors (L, W) of each caption -> y (B, L, W) float32, and where text is trimmed which
    rows are real, bool (B, L)."""
    y = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(t.copy()).float() for t in tokens], True)
    if not trimmed:
        return y, None
    lengths = torch.tensor([len(t) for t in tokens])
    return y, torch.arange(y.shape[1]) < lengths[:, None]

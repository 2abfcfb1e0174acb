"""Latents of one shard: pictures decoded and cropped in threads, encoded in the shard's order.

Batches are cut from the shard alone, never across shards, so a latent does not depend on what else
a worker does. While one shard is encoded, the next is read and decoded and the last is written:
a worker holds two, and whoever has `encoder_turn` hands batches to the encoder. Beside an
accelerator that runs in a thread of its own: the next batch is made while it computes.
"""

from __future__ import annotations

import collections
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pipeline.core.images import BadPicture, Crop, Small, fit, read_header, read_pixels
from pipeline.core.latents import posterior_sample
from pipeline.core.samples import Reject
from pipeline.core.stopwatch import Stopwatch
from pipeline.stages.images import StoredImage

READ_AHEAD = 3  # batches that wait for the encoder, decoded
IN_FLIGHT = 2  # batches in the encoder's hands: the one that it computes, and the next


class Encoder(Protocol):
    """What is asked of pipeline.encoders.autoencoder.ImageEncoder."""

    def moments(self, pixels: np.ndarray, exact: bool = False) -> Any: ...


@dataclass(frozen=True)
class Recipe:
    """How pictures become stored latents at one resolution."""

    resolution: int
    batch_size: int
    crop: Crop
    small: Small
    latents: str  # "mean", "sample" or "moments"
    dtype: str
    seed: int


@dataclass
class Made:
    """One resolution of one shard."""

    samples: list[dict[str, Any]] = field(default_factory=list)  # key, latent
    rejects: list[Reject] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)  # batches that were split, retried


class LatentMaker:
    """Made of one VAE.

    Args:
        encoder: gives the VAE; called when the first batch is ready, so it may load the weights.
        threads: that decode and resize, beside one that encodes; 0 does it all in turn, for an
            encoder on the same core.
        watch: is told where the time goes.
    """

    def __init__(self, encoder: Callable[[], Encoder], threads: int, watch: Stopwatch) -> None:
        self.encoder = encoder
        self.watch = watch
        self.encoder_turn = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, "decode") if threads else None
        self._encoding = ThreadPoolExecutor(1, "encode") if threads else None

    def make(self, images: Iterable[StoredImage], recipes: list[Recipe]) -> list[Made]:
        """Every recipe's latents of a shard; each picture is decoded once for all of them."""
        made = [Made() for _ in recipes]
        waiting: list[list[tuple[str, np.ndarray]]] = [[] for _ in recipes]
        prepared = self._prepared(images, recipes)
        in_flight: collections.deque[_InFlight] = collections.deque()

        def encode(number: int) -> None:
            batch, waiting[number] = waiting[number], []
            in_flight.append(self._encode(batch, recipes[number], made[number]))
            if len(in_flight) > IN_FLIGHT or self._encoding is None:
                self._keep(in_flight.popleft())

        first = next(prepared, None)  # reading and decoding begin before it is our turn
        with self.encoder_turn:
            for key, pictures in _and_then(first, prepared):
                for number, picture in enumerate(pictures):
                    if isinstance(picture, BadPicture):
                        reject = Reject(key, "encode", picture.reason, str(picture))
                        made[number].rejects.append(reject)
                        continue
                    waiting[number].append((key, picture))
                    if len(waiting[number]) == recipes[number].batch_size:
                        encode(number)
            for number, batch in enumerate(waiting):
                if batch:
                    encode(number)
        for batch in in_flight:
            self._keep(batch)
        return made

    def _prepared(
        self, images: Iterable[StoredImage], recipes: list[Recipe]
    ) -> Iterator[tuple[str, list[np.ndarray | BadPicture]]]:
        """(key, the picture at each resolution or why not), in order, a bounded number ahead."""
        if self._pool is None:
            for image in images:
                yield image.key, self._prepare(image, recipes)
            return
        ahead = READ_AHEAD * max(recipe.batch_size for recipe in recipes)
        queue: collections.deque[tuple[str, Future]] = collections.deque()
        for image in images:
            queue.append((image.key, self._pool.submit(self._prepare, image, recipes)))
            if len(queue) >= ahead:
                key, future = queue.popleft()
                yield key, self._await(future)
        for key, future in queue:
            yield key, self._await(future)

    def _await(self, future: Future) -> Any:
        with self.watch("waiting for pictures"):
            return future.result()

    def _prepare(self, image: StoredImage, recipes: list[Recipe]) -> list[np.ndarray | BadPicture]:
        try:
            with self.watch("decode"):
                shorter = read_header(image.data).shorter
                if all(r.small == "reject" and shorter < r.resolution for r in recipes):
                    # Told from the header, before a pixel is decoded.
                    return [_too_small(shorter, recipe) for recipe in recipes]
                pixels = read_pixels(image.data)
        except BadPicture as error:
            return [error for _ in recipes]
        fitted: list[np.ndarray | BadPicture] = []
        with self.watch("resize"):
            for recipe in recipes:
                try:
                    size, crop, seed = recipe.resolution, recipe.crop, recipe.seed
                    fitted.append(fit(pixels, size, crop, seed, image.key, recipe.small))
                except BadPicture as error:
                    fitted.append(error)
        return fitted

    def _encode(self, batch: list[tuple[str, np.ndarray]], recipe: Recipe, made: Made) -> _InFlight:
        pixels = np.stack([picture for _, picture in batch])
        moments = self._run(lambda encoder: _in_parts(encoder, pixels, made.counters))
        return _InFlight([key for key, _ in batch], pixels, moments, recipe, made)

    def _keep(self, batch: _InFlight) -> None:
        """What the encoder made of a batch -> samples and rejects."""
        moments, recipe, made = batch.moments(), batch.recipe, batch.made
        for number, key in enumerate(batch.keys):
            latent = _stored(moments[number], key, recipe)
            if not np.isfinite(latent).all():
                # bfloat16 and float16 overflow in some VAEs (diffusers #7188).
                made.counters["retried in float32"] += 1
                one = batch.pixels[number : number + 1]
                again = self._run(lambda encoder, one=one: encoder.moments(one, exact=True))()
                latent = _stored(np.asarray(again)[0], key, recipe)
            if np.isfinite(latent).all():
                made.samples.append({"key": key, "latent": latent})
            else:
                detail = f"not finite in {recipe.dtype}, nor when it was encoded in float32"
                made.rejects.append(Reject(key, "encode", "non-finite", detail))

    def _run(self, work: Callable[[Encoder], Any]) -> Callable[[], Any]:
        """Has the encoder work, or asks it to; what is returned waits for the result."""

        def timed() -> Any:
            encoder = self.encoder()  # may load the weights
            with self.watch("vae"):
                return work(encoder)

        if self._encoding is None:
            result = timed()
            return lambda: result
        return self._encoding.submit(timed).result


@dataclass
class _InFlight:
    """A batch in the encoder's hands."""

    keys: list[str]
    pixels: np.ndarray
    moments: Callable[[], np.ndarray]  # waits for them
    recipe: Recipe
    made: Made


def _in_parts(encoder: Encoder, pixels: np.ndarray, counters: Counter[str]) -> np.ndarray:
    """The moments of a batch; out of memory, in halves, which moves the last bits of a latent."""
    import torch

    try:
        return np.asarray(encoder.moments(pixels))
    except torch.OutOfMemoryError:
        if len(pixels) == 1:
            raise
    torch.cuda.empty_cache()
    counters["split, out of memory"] += 1
    half = len(pixels) // 2
    return np.concatenate([_in_parts(encoder, p, counters) for p in (pixels[:half], pixels[half:])])


def _stored(moments: np.ndarray, key: str, recipe: Recipe) -> np.ndarray:
    """(2C, h, w) float32 -> what the recipe keeps of it, raw, in its type."""
    if recipe.latents == "moments":
        kept = moments
    elif recipe.latents == "sample":
        kept = posterior_sample(moments, recipe.seed, key)
    else:
        kept = moments[: len(moments) // 2]
    with np.errstate(over="ignore"):  # what the type cannot hold is seen to by the caller
        return kept.astype(recipe.dtype)


def _too_small(shorter: int, recipe: Recipe) -> BadPicture:
    return BadPicture(
        "too-small", f"{shorter} pixels on the shorter side, needs {recipe.resolution}"
    )


def _and_then(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    if first is not None:
        yield first
        yield from rest

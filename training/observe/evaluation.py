"""The loss on held-out pictures, in fixed bins of noise, of the live weights and of the averages.

Always the same pictures with the same noise, so two steps of a run, or two runs, differ by their
weights only. Training does not notice: nothing is drawn from a generator that it uses, no mode is
switched, and weights come back to the bit.
"""

from __future__ import annotations

import itertools
from statistics import NormalDist

import torch
import torch.nn.functional as F
from composer import Callback, Logger, State
from composer.core.precision import get_precision_context
from composer.utils import dist
from torch import Tensor

from training.config.settings import Evaluate
from training.data.buffers import Pool
from training.data.heldout import Picture
from training.data.loader import Sample, collate
from training.observe.eval_context import EvalContext
from training.optim.ema import swap_weights
from training.randomness import keyed_seed


class Evaluation(Callback):
    """Every N steps and at the end of a stage; logs eval/<weights>/<bin> and eval/<weights>/mean.

    A bin is named by its place in training's distribution of noise: q06 is the level that 6 % of
    the steps' levels are below. The mean over all bins estimates the training loss without mask.

    Args:
        pictures: of this rank: numbers rank, rank + ranks, … of `total`; where there are fewer than
            ranks, any one.
        total: how many all ranks have, at least 1.
    """

    def __init__(
        self, context: EvalContext, settings: Evaluate, pictures: list[Picture], total: int
    ) -> None:
        self._context = context
        self._model = context.model
        self._settings = settings
        # All batches have one shape, as compiled code has a graph for each, and all ranks have as
        # many of them, as sharded weights are gathered by all together. What fills them up is the
        # last picture again, which does not count.
        ranks = dist.get_world_size()
        most, mine = -(-total // ranks), len(range(dist.get_global_rank(), total, ranks))
        size = min(context.batch_size, most)
        places = -(-most // size) * size
        padded = pictures + pictures[-1:] * (places - len(pictures))
        self._weights = [1.0] * mine + [0.0] * (places - mine)
        length = max(len(picture.caption.tokens) for picture in pictures)
        self._batches = [
            _batch(padded[i : i + size], length, context) for i in range(0, places, size)
        ]
        seed = self._model.objective.seed
        self._seeds = [keyed_seed(seed, "evaluate", p.source, p.key) for p in padded]

    def batch_end(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        if not self._context.due(step, self._settings.every):
            return
        with self._context.meter.paused():
            losses = {"live": self._losses(state)}
            for name, average in self._context.averages().items():
                with swap_weights(self._model.dit, average):
                    losses[name] = self._losses(state)
        bins = names(self._settings.bins)
        values: dict[str, float] = {}
        for name, found in losses.items():
            values |= {f"eval/{name}/{q}": v for q, v in zip(bins, found, strict=True)}
            values[f"eval/{name}/mean"] = sum(found) / len(found)
        self._context.metrics.report(step, values, logger)
        means = ", ".join(f"{name} {values[f'eval/{name}/mean']:.4f}" for name in losses)
        self._context.say(step, f"held-out loss: {means}")

    def _losses(self, state: State) -> list[float]:
        """Mean over all pictures of all ranks, of each bin."""
        device = next(self._model.parameters()).device
        levels = [NormalDist().inv_cdf(q) for q in quantiles(self._settings.bins)]
        sums = torch.zeros(len(levels) + 1, dtype=torch.float64, device=device)
        first = 0
        for host in self._batches:
            batch = {name: value.to(device) for name, value in host.items()}
            size = len(batch["latents"])
            weights = torch.tensor(self._weights[first : first + size], dtype=torch.float64)
            noise = _noise(self._seeds[first : first + size], batch["latents"].shape[1:])
            first += size
            weights, noise = weights.to(device), noise.to(device)
            for number, level in enumerate(levels):
                # A context of its own for each: autocast keeps the weights that it has cast.
                with get_precision_context(state.precision, state.precision_config):
                    found = self._model.heldout_loss(batch, noise.new_full((size,), level), noise)
                sums[number] += (weights * found.double()).sum()
            sums[-1] += weights.sum()
        dist.all_reduce(sums, reduce_operation="SUM")
        return (sums[:-1] / sums[-1]).tolist()


def quantiles(bins: int) -> list[float]:
    """The middles of as many equal parts of (0, 1)."""
    return [(number + 0.5) / bins for number in range(bins)]


def names(bins: int) -> list[str]:
    """q and each bin's place in percent, with as many more digits as tell them apart."""
    for digits in itertools.count(2):
        found = [f"q{round(10**digits * q):0{digits}}" for q in quantiles(bins)]
        if len(set(found)) == bins:
            return found
    raise AssertionError


def _batch(pictures: list[Picture], length: int, context: EvalContext) -> dict[str, Tensor]:
    """As the loader makes them, with captions of `length` rows."""
    samples = [
        Sample(
            key=p.key, caption=p.caption.text, latent=p.latent, tokens=p.caption.tokens, drop=1.0
        )
        for p in pictures
    ]
    pools = Pool(0, 0, 0), Pool(0, 0, 0)
    batch = collate(samples, context.vae, context.trimmed, pools)
    missing = length - batch["y"].shape[1]
    if missing:
        batch["y"] = F.pad(batch["y"], (0, 0, 0, missing))
        batch["y_mask"] = F.pad(batch["y_mask"], (0, missing))
    return batch


def _noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

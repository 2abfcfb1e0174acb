"""Training's random numbers: of a step (seed, stage, step, place in the global batch), drawn on the
device, and of a sample (seed, stage, source, key, epoch), drawn where it is read. After a roll-back
the stage's part of every key says so (`stage_key`), and nothing else changes.

Nothing here reads or moves torch's global generator, so a run that was killed and resumed, or that
goes on with another number of ranks, draws the very same noise.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step, for this rank's B samples."""

    noise: Tensor
    """Unit normal (B, C, S, S): what is added to the latents, before sigma."""
    level: Tensor
    """Unit normal (B,): decides sigma."""
    mask: Tensor
    """Uniform (B, T): decides which tokens the mask keeps."""


@dataclass(frozen=True)
class Rows:
    """Which rows of the global batch this rank has: first, first + step, first + 2 step, …"""

    first: int = 0
    step: int = 1


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from a key; neighbouring keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stage_key(stage: str, rollbacks: int) -> str:
    """The stage's part of a key: its name, and after roll-backs how many there were.

    A stage's name holds no slash, so no two keys are the same.
    """
    return f"{stage}/{rollbacks}" if rollbacks else stage


def picture_noise(seed: int, indexes: Iterable[int], latent: tuple[int, int, int]) -> Tensor:
    """Unit normal (N, C, S, S) that a sampler begins with; that of picture i is a function of
    (seed, i)."""
    generators = (torch.Generator().manual_seed(keyed_seed(seed, "picture", i)) for i in indexes)
    return torch.stack([torch.randn(latent, generator=generator) for generator in generators])


def draw(
    key: tuple[int | str, ...],
    batch_size: int,
    latent: tuple[int, int, int],
    tokens: int,
    rows: Rows,
    device: torch.device,
) -> Draws:
    """The numbers of one step.

    Draws the global batch and keeps this rank's rows: a memory-bound moment on a GPU, and what
    makes the numbers independent of how many ranks and micro-batches share the work.

    Args:
        key: (seed, `stage_key`, step).
        batch_size: samples over all ranks.
        latent: (C, S, S).
        tokens: patches of one latent.
    """
    generator = torch.Generator(device).manual_seed(keyed_seed(*key))
    take = slice(rows.first, None, rows.step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator, device=device)[take]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch_size, *shape, generator=generator, device=device)[take]

    # clone: a view would keep the whole global batch in memory for the length of the step.
    return Draws(normal(*latent).clone(), normal(), uniform(tokens).clone())


def sample_uniform(*key: int | str) -> float:
    """Uniform in [0, 1), exact in float32, of e.g. (what for, seed, stage, source, key, epoch)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=3).digest()
    return int.from_bytes(digest, "big") * 2.0**-24

"""Which captioner's caption a picture trains with: one, or a seeded draw from a weighted mix."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pipeline.core.errors import SettingError


@dataclass(frozen=True)
class Mix:
    """Captioners and their weights, summing to 1."""

    weights: dict[str, float]

    @staticmethod
    def parse(text: str) -> Mix:
        """ "alt", "colour", or "alt:0.9,colour:0.1".

        Raises:
            SettingError: a weight that is no positive number, or a name that is there twice.
        """
        weights: dict[str, float] = {}
        for part in text.split(","):
            name, _, weight = part.strip().partition(":")
            if name in weights:
                raise SettingError(f"captions={text}: {name} is there twice; give it one weight")
            try:
                weights[name] = float(weight or 1)
            except ValueError:
                weights[name] = -1
            if not name or not 0 < weights[name] < float("inf"):
                raise SettingError(f"captions={text}: write NAME or NAME:WEIGHT,NAME:WEIGHT")
        total = sum(weights.values())
        return Mix({name: weight / total for name, weight in weights.items()})

    def draw(self, seed: int, key: str) -> str:
        """The captioner for a key: a function of (seed, key) alone."""
        digest = hashlib.sha256(f"caption:{seed}:{key}".encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64
        for name, weight in self.weights.items():
            point -= weight
            if point < 0:
                return name
        return list(self.weights)[-1]

    def __str__(self) -> str:
        """As `parse` reads it, in order of name."""
        return self._spelt(12)

    def _spelt(self, digits: int) -> str:
        if len(self.weights) == 1:
            return next(iter(self.weights))
        return ",".join(f"{n}:{self.weights[n]:.{digits}g}" for n in sorted(self.weights))


def same(one: str, other: str) -> bool:
    """Whether two texts name one mix: order and scale of the weights are spelling."""
    if one == other:
        return True
    try:
        return Mix.parse(one)._spelt(6) == Mix.parse(other)._spelt(6)
    except SettingError:
        return False

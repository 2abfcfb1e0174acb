"""No masking."""

from __future__ import annotations

from dataclasses import dataclass

from training.masking.scheme import Scheme


@dataclass(frozen=True)
class Unmasked(Scheme):
    """Keeps every token and refuses to drop any."""

    def kept(self, tokens: int, ratio: float) -> int:
        """All of them.

        Raises:
            ValueError: ``ratio`` is not 0.
        """
        if ratio != 0:
            raise ValueError(f"mask_ratio {ratio:g} with mask none: name a mask, deferred")
        return tokens

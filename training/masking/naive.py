"""Naive masking, the baseline of MicroDiT (arXiv 2407.15811): dropped patches are never seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.masking.scheme import Scheme

if TYPE_CHECKING:
    from training.network.tokens import Skips


@dataclass(frozen=True)
class Naive(Scheme):
    """Tokens are dropped right after the patch embedding. The paper's baseline has no mixer either
    (``mixer_depth`` 0); a mixer that is there sees the kept tokens alone."""

    @property
    def skips(self) -> Skips:
        return "network"

"""Token routing (TREAD, arXiv 2501.04765): tokens take a shortcut past blocks; none is dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from training.masking.scheme import Scheme

if TYPE_CHECKING:
    from training.network.config import DiTConfig
    from training.network.tokens import Skips


@dataclass(frozen=True)
class Tread(Scheme):
    """A random share of tokens bypasses a run of backbone blocks and rejoins in its places.

    Every patch has an output and counts in the loss. Adds no parameters.
    """

    tread_blocks: tuple[int, int] = field(metadata={"example": (2, 24)})
    """First and last backbone block that routed tokens bypass, both included, counted from 0. The
    published code's rule, from block 2 to block depth - 4, is (2, 24) for 28 blocks: the first two
    and the last three see all tokens."""

    def __post_init__(self) -> None:
        first, last = self.tread_blocks
        if not 0 <= first <= last:
            raise ValueError(
                f"tread_blocks [{first}, {last}]: give the first and the last bypassed block, "
                "counted from 0"
            )

    @property
    def skips(self) -> Skips:
        return self.tread_blocks

    def check(self, config: DiTConfig) -> None:
        first, last = self.tread_blocks
        if last >= config.depth:
            raise ValueError(
                f"tread_blocks [{first}, {last}]: the backbone's last block is {config.depth - 1}"
            )

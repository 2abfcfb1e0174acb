"""Which part of a source training never sees: a share, chosen by a hash of names."""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import Field

SPLIT = "heldout"
Share = Annotated[float, Field(ge=0, lt=1)]


def is_held_out(name: str, share: float) -> bool:
    """By the name alone, so that what comes later moves nothing to the other side; what a share
    holds out a larger one does as well."""
    place = hashlib.sha256(f"holdout:{name}".encode("utf-8", "surrogateescape")).digest()[:8]
    return int.from_bytes(place, "big") < share * 2**64

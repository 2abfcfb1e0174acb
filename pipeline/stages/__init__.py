"""WHAT is done: one file a verb of `pipeline run`, one table.

A stage is a pure function of (input shard, stage config, weights) and does not know who runs it:
`plan` says which shards there are and what decides their bytes, `open` returns the worker that
makes one. It knows nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.core.commits import Commit
from pipeline.core.manifest import Manifest
from pipeline.core.samples import InputShard
from pipeline.core.store import Store


@dataclass(frozen=True)
class Job:
    """One input shard and the output groups that are wanted of it."""

    shard: InputShard
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)  # group -> fingerprint inputs


class Stage(Protocol):
    name: str

    def plan(self, store: Store) -> Iterable[Job]:
        """Every input shard with every group the stage makes of it, done or not."""
        ...

    def open(self, store: Store) -> Callable[[Job], dict[str, Commit]]:
        """The worker: called once a process, loads weights on first use."""
        ...

    def manifest(self, group: str) -> Manifest | None:
        """The passport of a group that training reads; None for tars and captions."""
        ...


#: Stage name -> class ("module:attribute"); `pipeline run all` runs them in this order.
STAGES: dict[str, str] = {
    "download": "pipeline.stages.download:Download",
    "caption": "pipeline.stages.caption:CaptionStage",
    "encode": "pipeline.stages.encode:Encode",
}

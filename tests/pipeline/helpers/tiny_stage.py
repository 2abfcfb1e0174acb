"""A stage of next to no work, for what is about the runner: some of its shards misbehave."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.core.catalog import Catalog
from pipeline.core.commits import Commit, write_shard
from pipeline.core.samples import InputShard, Reject
from pipeline.core.stage import Job, Needs
from pipeline.core.store import Store

GROUP = "toy/tiny"


@dataclass
class TinyStage:
    """`count` shards of `samples` keys each.

    Args:
        bad: shard number -> "raise", "die" (as a segmentation fault does), "hang", "reject"
            (every sample), "slow" (20 s) or "once" (dies the first time).
    """

    count: int
    samples: int = 1
    bad: dict[int, str] = field(default_factory=dict)
    needs: Needs = Needs()  # noqa: RUF009 - frozen
    name: str = "tiny"
    source: str = "toy"

    def groups(self) -> list[str]:
        return [GROUP]

    def plan(self, catalog: Catalog) -> Iterable[Job]:
        for number in range(self.count):
            inputs = {"stage": self.name, "number": number, "config": dict.fromkeys("abcdefgh", 1)}
            yield Job(InputShard(f"{number:05d}", "train"), {GROUP: inputs})

    def estimate(self, job: Job, group: str) -> int:
        return 100

    def open(self, store: Store) -> _TinyWorker:
        return _TinyWorker(self, store)


class _TinyWorker:
    def __init__(self, stage: TinyStage, store: Store) -> None:
        self.stage, self.store = stage, store
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
        self.counters = Counter({f"opened with devices {devices}": 1})

    def take_counters(self) -> Counter[str]:
        taken, self.counters = self.counters, Counter()
        return taken

    def __call__(self, job: Job) -> dict[str, Commit]:
        keys = [f"{job.shard.id}{i:04d}" for i in range(self.stage.samples)]
        rejects: list[Reject] = []
        match self.stage.bad.get(int(job.shard.id)):
            case "raise":
                raise ValueError("this shard is poisoned")
            case "die":
                os._exit(11)
            case "once":
                if not self.store.exists("toy/died"):
                    self.store.write("toy/died", b"")
                    os._exit(11)
            case "hang":
                time.sleep(600)
            case "slow":
                time.sleep(20)
            case "reject":
                rejects = [Reject(key, "tiny", "bad", "as told") for key in keys]
                keys = []
        name, data = f"{job.shard.id}.bin", "".join(keys).encode()
        inputs = job.groups[GROUP]
        return {
            GROUP: write_shard(self.store, GROUP, job.shard, inputs, {name: data}, keys, rejects)
        }

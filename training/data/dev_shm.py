"""/dev/shm, through which loader processes hand batches over: whether it is large enough. A
container's usual 64 MB is not; what is written beyond its size ends a process with SIGBUS, which
nobody can catch. No torch here."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pipeline.core.errors import SettingError
from pipeline.core.limits import SHM, require_shared_memory
from pipeline.core.store import size
from training.config.plan import TrainingPlan
from training.ranks import world_size

PREFETCH = 4  # batches that each loader process makes ahead
_OWN = 1 << 20  # bytes: locks, counters and states of StreamingDataset


def require(plan: TrainingPlan, stages: Sequence[str]) -> None:
    """
    Args:
        stages: those that are left to do.

    Raises:
        SettingError: it is missing, or has no room for the largest of them.
    """
    require_shared_memory()
    if not SHM.is_dir():  # not Linux
        return
    facts = os.statvfs(SHM)
    free = facts.f_bavail * facts.f_frsize
    need, name = max(((needed(plan, name), name) for name in stages), default=(0, ""))
    if need > free:
        workers = plan.config.data.workers
        remedy = ", or fewer data.workers (0 reads in the trainer)" if workers else ""
        raise SettingError(
            f"{SHM}: {size(free)} free, stage {name} needs {size(need)} for batches on their way "
            f"from {workers} loader processes a rank; give the container more "
            f"(docker run --shm-size={-(-need // 1_000_000_000)}g, or --ipc=host){remedy}"
        )


def needed(plan: TrainingPlan, name: str) -> int:
    """Bytes of shared memory that the ranks of this node take at a stage: every buffer of
    `training.data.buffers`, and the order of an epoch."""
    stage, side = plan.config.stages[name], plan.latent_side(plan.config.stages[name])
    sample = 4 * plan.vae.channels * side * side + 2 * plan.text.length * plan.text.width
    batches = plan.config.data.workers * (PREFETCH + 1)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    order = 8 * sum(source.samples for source in plan.data[name])
    return ranks * batches * sample * (stage.batch_size // world_size()) + order + _OWN

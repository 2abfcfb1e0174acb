"""AdamW, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn import Parameter

from training.config import Optimizer, Stage


def make_optimizer(parameters: Iterable[Parameter], settings: Optimizer, lr: float):
    """AdamW over all parameters, in one kernel a device where torch has it (CPU and CUDA)."""
    return torch.optim.AdamW(
        parameters,
        lr=lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of a step (0 is the first): linear warm-up, then constant or a half cosine.

    A function of the step alone: a resumed run has no schedule state to restore, and Composer's own
    schedulers lag one step behind.
    """
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    if stage.schedule == "constant":
        return stage.lr
    done = (step - stage.warmup) / (stage.steps - stage.warmup)
    return stage.lr * (
        stage.final_lr + (1 - stage.final_lr) * (1 + math.cos(math.pi * min(done, 1))) / 2
    )

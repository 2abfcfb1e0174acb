"""The optimizer with its groups of parameters, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from training.config.settings import Optimizer
from training.config.stage_settings import StageSettings
from training.network.layers import CrossAttention, GeluMLP, SelfAttention, SwiGLU
from training.network.moe import ExpertChoiceMLP
from training.optim.muon import Group, Muon


def make_optimizer(network: nn.Module, settings: Optimizer, lr: float) -> torch.optim.AdamW | Muon:
    """AdamW over all parameters, in one kernel a device where torch has it (CPU and CUDA); where
    `settings.muon` is given, Muon over the blocks' matrices.

    Each group has "lr_factor", its learning rate as a multiple of the stage's.
    """
    groups = [*parameter_groups(network, settings, lr)]
    muon = settings.muon
    if muon is None:
        return torch.optim.AdamW(
            [dict(group) for group in groups], betas=settings.betas, eps=settings.eps, fused=True
        )
    return Muon(groups, settings.betas, settings.eps, muon.momentum, muon.nesterov, muon.scale)


def parameter_groups(network: nn.Module, settings: Optimizer, lr: float) -> list[Group]:
    """The network's parameters by how they are trained, in the order of their first parameters.

    Modules decide by their type. Parameters have names that nobody means anything by: the released
    code looks for "moe" in them, finds none, and trains experts at the full rate.
    """
    experts: set[Parameter] = set()
    matrices: dict[Tensor, int] = {}
    for module in network.modules():
        if isinstance(module, ExpertChoiceMLP):
            experts.update(module.parameters())
        if settings.muon is not None:
            matrices |= _matrices(module)
    groups: dict[tuple[int | None, float], Group] = {}
    for parameter in network.parameters():
        count = matrices.get(parameter)
        factor = settings.expert_lr if parameter in experts else 1.0
        if settings.muon is not None and count is not None:
            factor *= settings.muon.lr
        group = groups.setdefault(
            (count, factor),
            {
                "params": [],
                "kind": "adamw" if count is None else "muon",
                "lr": lr * factor,
                "lr_factor": factor,
                "weight_decay": settings.weight_decay,
                "matrices": count or 0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _matrices(module: nn.Module) -> dict[Tensor, int]:
    """What Muon trains of a module -> its `Group.matrices`.

    Not what its authors leave to AdamW: embeddings, projections in and out, norms, biases; nor,
    as they are of that kind, modulations and the experts' router.
    """
    match module:
        case SelfAttention():
            return {module.qkv.weight: 3, module.proj.weight: 1}
        case CrossAttention():
            return {
                module.q_linear.weight: 1,
                module.kv_linear.weight: 2,
                module.proj.weight: 1,
            }
        case SwiGLU():
            return {module.w1.weight: 1, module.w2.weight: 1, module.w3.weight: 1}
        case GeluMLP():
            return {module.w1.weight: 1, module.w2.weight: 1}
        case ExpertChoiceMLP():
            return {module.w1: 0, module.w2: 0}
    return {}


def learning_rate(stage: StageSettings, step: int) -> float:
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

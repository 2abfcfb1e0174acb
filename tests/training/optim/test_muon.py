"""Muon equals a plain reference, matrix by matrix; the rest is AdamW; module types make groups."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from training.config.settings import Muon as MuonSettings
from training.config.settings import Optimizer
from training.network.blocks import DiTBlock, Modulation
from training.network.config import DiTConfig
from training.network.dit import MicroDiT
from training.network.moe import ExpertChoiceMLP
from training.optim.muon import Group, Muon, orthogonalise
from training.optim.optimizers import make_optimizer, parameter_groups

LR, DECAY, MOMENTUM = 0.03, 0.1, 0.9


def network() -> MicroDiT:
    sizes: dict[str, Any] = {"width": 32, "depth": 3, "head_dim": 16, "multiple_of": 16}
    config = DiTConfig(
        **sizes, input_size=8, mixer_width=16, mixer_depth=2, num_experts=2, caption_width=16
    )
    network = MicroDiT(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return network


def gradients(shape: torch.Size, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def plain(weight: np.ndarray, grads: list[Tensor], out: int, scale: str) -> np.ndarray:
    """One (out, in) or (in, out) matrix: momentum, Newton-Schulz, decay, in float64."""
    momentum = np.zeros_like(weight)
    for grad in grads:
        g = grad.double().numpy()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * g
        x = MOMENTUM * momentum + (1 - MOMENTUM) * g
        x = x / np.linalg.norm(x)
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        wide = max(x.shape) if scale == "rms" else max(1, out / (x.size / out))
        factor = 0.2 if scale == "rms" else 1
        weight = weight * (1 - LR * DECAY) - LR * factor * wide**0.5 * x
    return weight


@pytest.mark.parametrize("scale", ["rms", "spectral"])
@pytest.mark.parametrize(
    ("shape", "matrices"),
    [((6, 10), 1), ((10, 6), 1), ((12, 8), 3), ((12, 8), 2), ((3, 6, 10), 0), ((2, 10, 6), 0)],
)
def test_equals_a_loop_over_plain_matrices(
    shape: tuple[int, ...], matrices: int, scale: Any
) -> None:
    parameter = Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
    parts = np.split(parameter.detach().double().numpy(), matrices) if matrices else parameter
    start = [np.array(torch.as_tensor(part).detach().double()) for part in parts]
    grads = gradients(parameter.shape, 3)
    group: Group = {
        "params": [parameter],
        "kind": "muon",
        "lr": LR,
        "lr_factor": 1.0,
        "weight_decay": DECAY,
        "matrices": matrices,
    }
    optimizer = Muon([group], momentum=MOMENTUM, scale=scale)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, grad)
    own = [list(g.chunk(matrices) if matrices else g) for g in grads]
    expected = [
        plain(weight, [g[i] for g in own], weight.shape[0 if matrices else 1], scale)
        for i, weight in enumerate(start)
    ]
    found = parameter.detach().double().numpy()
    whole = np.concatenate(expected) if matrices else np.stack(expected)
    np.testing.assert_allclose(found, whole, atol=2e-5)


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (4, 12, 24)])
def test_updates_are_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    # Singular values from 1 to 100: no matter how stretched, they end near 1.
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    stretched = u * torch.logspace(0, 2, u.shape[-1]) @ v
    for matrix in (x, stretched, 1e-4 * stretched):
        values = torch.linalg.svdvals(orthogonalise(matrix))
        assert (values > 0.5).all()
        assert (values < 1.3).all()
    singular = torch.linalg.svd(orthogonalise(stretched), full_matrices=False)
    # The same directions: U^T of the one and of the other agree up to order and sign.
    torch.testing.assert_close((singular.U @ singular.Vh).abs(), (u @ v).abs(), atol=5e-2, rtol=0)


# argv: the rank, a file to meet at, a file for the results.
ONE_RANK = """
import sys, torch
import torch.distributed as dist
from tests.training.optim.test_muon import LR, three_steps
rank, meet, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=2)
torch.save(three_steps(), f"{out}{rank}")
"""


def three_steps() -> dict[str, Tensor]:
    """A network's weights after three steps with gradients that are always the same."""
    model = network()
    optimizer = make_optimizer(model, Optimizer(muon=MuonSettings()), LR)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model.state_dict()


@pytest.mark.slow
def test_ranks_share_the_work(tmp_path: Path) -> None:
    """Each orthogonalises its part; the weights are those of one rank, to the last bit."""
    arguments = [str(tmp_path / "meet"), str(tmp_path / "weights")]
    command = [sys.executable, "-W", "ignore", "-c", ONE_RANK]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(r), *arguments], env=env) for r in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    expected = three_steps()
    for rank in range(2):
        found = torch.load(tmp_path / f"weights{rank}")
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_zero_gradient_moves_nothing_but_decay() -> None:
    assert not orthogonalise(torch.zeros(3, 4, 5)).any()


@pytest.mark.parametrize("change", [{}, {"feed_forward": "gelu", "decoder_depth": 1}], ids=str)
def test_what_muon_trains_is_told_by_module_types(change: dict[str, Any]) -> None:
    """Every matrix of the blocks but modulations and routers; nothing else."""
    model = MicroDiT(dataclasses.replace(network().config, **change))
    decoder = [] if model.decoder is None else model.decoder.blocks
    groups = parameter_groups(model, Optimizer(muon=MuonSettings()), LR)
    muon = {p for group in groups if group["kind"] == "muon" for p in group["params"]}
    every = [p for group in groups for p in group["params"]]
    assert len(every) == len(set(every)) == len(list(model.parameters()))
    wanted: set[Tensor] = set()
    for block in [*model.patch_mixer, *model.blocks, *decoder, model.y_emb_preprocess]:
        left_out: set[Tensor] = set()
        for module in block.modules():
            if isinstance(module, Modulation):
                left_out.update(module.parameters())
            if isinstance(module, ExpertChoiceMLP):
                left_out.add(module.gate.weight)
        wanted |= {p for p in block.parameters() if p.dim() >= 2} - left_out
    assert muon == wanted
    # Queries, keys and values are matrices of their own; experts are stacks.
    counts: dict[Tensor, int] = {p: group["matrices"] for group in groups for p in group["params"]}
    block = model.blocks[1]
    assert isinstance(block, DiTBlock)
    assert isinstance(block.mlp, ExpertChoiceMLP)
    assert counts[block.attn.qkv.weight] == 3
    assert counts[block.cross_attn.kv_linear.weight] == 2
    assert counts[block.attn.proj.weight] == 1
    assert counts[block.mlp.w1] == counts[block.mlp.w2] == 0


def test_the_rest_is_adamw_to_the_last_bit() -> None:
    first, second = network(), network()
    mixed = make_optimizer(first, Optimizer(muon=MuonSettings(), expert_lr=0.5), LR)
    adamw = make_optimizer(second, Optimizer(expert_lr=0.5), LR)
    assert isinstance(mixed, Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mixed.step()
        adamw.step()
    muon = {p for g in mixed.param_groups if g["kind"] == "muon" for p in g["params"]}
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) == (a not in muon)


def test_its_learning_rate_is_a_multiple_of_the_stages() -> None:
    settings = Optimizer(expert_lr=0.5, muon=MuonSettings(lr=10.0))
    groups = parameter_groups(network(), settings, LR)
    kinds = {(group["kind"], group["matrices"], group["lr_factor"]) for group in groups}
    assert kinds == {
        ("adamw", 0, 1.0),
        ("adamw", 0, 0.5),  # routers
        ("muon", 1, 10.0),
        ("muon", 2, 10.0),
        ("muon", 3, 10.0),
        ("muon", 0, 5.0),  # experts
    }
    assert all(group["lr"] == LR * group["lr_factor"] for group in groups)


class MoeLookalike(nn.Module):
    """Its name, and its parameters', say "moe" and "experts"; it has none."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = nn.Linear(4, 4)
        self.experts_mlp = nn.Linear(4, 4)
        self.plain = ExpertChoiceMLP(4, 8, 2, 2.0)


def test_experts_have_half_the_rate_and_nothing_else() -> None:
    model = nn.ModuleDict({"network": network(), "moe": MoeLookalike()})
    groups = parameter_groups(model, Optimizer(), LR)
    assert [group["lr_factor"] for group in groups] == [1.0, 0.5]
    layers = [module for module in model.modules() if isinstance(module, ExpertChoiceMLP)]
    assert len(layers) == 3  # of the mixer, the backbone, and the one that bears no telling name
    expected = {p for layer in layers for p in (layer.w1, layer.w2, layer.gate.weight)}
    assert set(groups[1]["params"]) == expected


def test_a_factor_of_one_leaves_one_group() -> None:
    model = network()
    optimizer = make_optimizer(model, Optimizer(expert_lr=1.0, weight_decay=0.2), LR)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    assert optimizer.param_groups[0]["weight_decay"] == 0.2  # norms and biases decay too
    assert optimizer.param_groups[0]["lr"] == LR

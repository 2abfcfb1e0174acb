"""Averages of the weights follow their closed forms and touch nothing but themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from training.checkpoint.checkpoints import Average
from training.config.stage_settings import Power
from training.optim.ema import EMA

WEIGHTS = [0.0, 1.0, 5.0, 2.0, -3.0, 4.0, 4.0]


class FakeState:
    """As much of Composer's State as the averages read."""

    class timestamp:
        class batch:
            value = 0


def network() -> nn.Linear:
    network = nn.Linear(1, 1, bias=False)
    network.register_buffer("counter", torch.tensor(7))
    network.register_buffer("table", torch.tensor([1.5]))
    return network


def value(ema: EMA, name: str, module: nn.Linear) -> float:
    """Of an average, or of the weight where that has not begun."""
    average = ema.state_dict()["averages"].get(name)
    return (average["values"]["weight"] if average else module.weight).item()


def follow(
    ema: EMA, module: nn.Linear, weights: list[float], first_step: int = 0
) -> dict[str, list[float]]:
    """Each average after each of the weights, of which the first are those before training."""
    state: Any = FakeState()
    found: dict[str, list[float]] = {name: [] for name in ema._names}
    for step, weight in enumerate(weights, first_step):
        module.weight.data.fill_(weight)
        live = module.weight
        state.timestamp.batch.value = step
        if step == 0:
            ema.fit_start(state, None)  # pyright: ignore
        else:
            ema.batch_end(state, None)  # pyright: ignore
        assert module.weight is live
        assert live.item() == weight
        for name in found:
            found[name].append(value(ema, name, module))
    state.timestamp.batch.value = 0
    return found


def exponential(decay: float, weights: list[float]) -> float:
    last = len(weights) - 1
    shares = [decay**last, *((1 - decay) * decay ** (last - i) for i in range(1, last + 1))]
    return sum(share * weight for share, weight in zip(shares, weights, strict=True))


def power(gamma: float, weights: list[float]) -> float:
    """The share of step i of t is the integral of tau^gamma over (i - 1, i), over that to t."""
    t = len(weights) - 1
    shares = [(i / t) ** (gamma + 1) - ((i - 1) / t) ** (gamma + 1) for i in range(1, t + 1)]
    return sum(share * weight for share, weight in zip(shares, weights[1:], strict=True))


def test_several_at_once_follow_their_closed_forms() -> None:
    profiles = {
        "0.5": 0.5,
        "0.9": 0.9,
        "power-0.05": Power(power=0.05),
        "power-0.1": Power(power=0.1),
    }
    # sigma_rel of gamma = 16.97 is 0.05 and of 6.94 is 0.1 (arXiv 2312.02696, section 3.1).
    gamma = {}
    for name, rough in (("power-0.05", 16.97), ("power-0.1", 6.94)):
        width = float(name.removeprefix("power-"))
        grid = [rough + d / 1e5 for d in range(-1000, 1001)]
        gamma[name] = min(grid, key=lambda g: abs(math.sqrt((g + 1) / (g + 3)) / (g + 2) - width))
        assert abs(gamma[name] - rough) < 0.009  # within the grid, so the paper's value
    module = network()
    found = follow(EMA(module, profiles), module, WEIGHTS)
    for i in range(1, len(WEIGHTS)):
        so_far = WEIGHTS[: i + 1]
        assert found["0.5"][i] == pytest.approx(exponential(0.5, so_far), abs=1e-6)
        assert found["0.9"][i] == pytest.approx(exponential(0.9, so_far), abs=1e-6)
        for name, exponent in gamma.items():
            assert found[name][i] == pytest.approx(power(exponent, so_far), abs=1e-4)


def test_buffers_are_not_averaged() -> None:
    module = network()
    ema = EMA(module, {"0.5": 0.5})
    follow(ema, module, WEIGHTS)
    assert ema.averages()["ema"].keys() == {"weight"}
    buffers = dict(module.named_buffers())
    assert buffers["counter"].item() == 7
    assert buffers["counter"].dtype == torch.int64
    assert buffers["table"].item() == 1.5


def test_before_its_start_an_average_is_the_weights() -> None:
    module = network()
    profiles = {"0.5": 0.5, "power-0.1": Power(power=0.1)}
    found = follow(EMA(module, profiles, start=2), module, [0.0, 1.0, 2.0, 3.0])
    assert found["0.5"] == [0.0, 1.0, 2.0, 2.5]
    assert found["power-0.1"] == [0.0, 1.0, 2.0, 3.0]  # its first update forgets what was before


def test_the_first_is_the_main_one() -> None:
    module = network()
    ema = EMA(module, {"0.9": 0.9, "0.5": 0.5})
    found = follow(ema, module, WEIGHTS)
    assert list(ema.averages()) == ["ema", "ema-0.5"]
    assert ema.averages()["ema"]["weight"].item() == found["0.9"][-1] != found["0.5"][-1]


def test_averages_go_on_by_name_into_the_next_stage() -> None:
    module = network()
    profiles = {"0.5": 0.5, "power-0.1": Power(power=0.1)}
    whole = follow(EMA(module, profiles), module, WEIGHTS)
    first = EMA(module, profiles)
    follow(first, module, WEIGHTS[:4])
    before: dict[str, Average] = first.state_dict()["averages"]
    copies: dict[str, Average] = {
        name: {
            "updates": average["updates"],
            "values": {k: v.clone() for k, v in average["values"].items()},
        }
        for name, average in before.items()
    }
    second = EMA(module, {"0.25": 0.25, **profiles}, before=copies)
    found = follow(second, module, WEIGHTS[3:])  # begins where the first ended
    for name in profiles:
        assert found[name] == whole[name][3:], name
    assert found["0.25"][0] == WEIGHTS[3]  # a new one begins with the stage's first weights
    restarted = follow(EMA(module, profiles, 1, before), module, [9.0, 8.0])
    assert restarted["0.5"] == [9.0, 8.0]


def test_a_resumed_stage_goes_on_with_its_averages() -> None:
    module = network()
    profiles = {"0.5": 0.5, "power-0.1": Power(power=0.1)}
    whole = follow(EMA(module, profiles), module, WEIGHTS)
    first, second = EMA(module, profiles), EMA(module, profiles)
    follow(first, module, WEIGHTS[:4])
    second.load_state_dict(first.state_dict())
    found = follow(second, module, WEIGHTS[4:], first_step=4)
    assert {name: values[4:] for name, values in whole.items()} == found


def test_no_average() -> None:
    module = network()
    ema = EMA(module, {}, before={"0.5": {"updates": 1, "values": {"weight": torch.zeros(1, 1)}}})
    follow(ema, module, WEIGHTS)
    assert ema.state_dict() == {"averages": {}}
    assert ema.averages() == {}

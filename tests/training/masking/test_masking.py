"""Masks equal a transcription of their definition; taking tokens out and putting them back are
inverse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.checkout import ROOT
from tests.training.helpers.networks import scheme_settings
from training.config.load import load
from training.masking import MASKS
from training.masking.block import Block
from training.masking.deferred import Deferred
from training.masking.ratio import RatioSchedule, ratio_at, ratio_steps
from training.masking.scheme import Scheme, kept_tokens, make_scheme
from training.masking.tread import Tread
from training.network.config import MODELS, DiTConfig


def scheme_of(name: str) -> Scheme:
    return make_scheme(name, scheme_settings(name))


MASKING = sorted(MASKS.keys() - {"none"})


def reference(noise: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch, tokens = noise.shape
    ids_keep = np.zeros((batch, keep), dtype=np.int64)
    ids_restore = np.zeros((batch, tokens), dtype=np.int64)
    mask = np.ones((batch, tokens), dtype=np.float32)
    for b in range(batch):
        order = sorted(range(tokens), key=lambda t: noise[b, t])
        ids_keep[b] = order[:keep]
        mask[b, order[:keep]] = 0
        ids_restore[b, order] = np.arange(tokens)
    return ids_keep, ids_restore, mask


def noise(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(tokens + 1000 * seed))


@pytest.mark.parametrize("name", ["deferred", "naive", "maskdit", "tread"])
@pytest.mark.parametrize(("tokens", "ratio"), [(16, 0.75), (64, 0.5), (256, 0.9), (9, 0.1)])
def test_equals_reference(name: str, tokens: int, ratio: float) -> None:
    numbers = noise(5, tokens)
    mask = scheme_of(name).draw(numbers, ratio)
    assert mask is not None
    ids_keep, ids_restore, lost = reference(numbers.numpy(), kept_tokens(tokens, ratio))
    if name == "tread":
        lost[:] = 0  # nothing is lost: every token rejoins
    expected = (ids_keep, ids_restore, lost)
    for actual, wanted in zip((mask.ids_keep, mask.ids_restore, mask.mask), expected, strict=True):
        assert actual.numpy().dtype == wanted.dtype
        np.testing.assert_array_equal(actual.numpy(), wanted)


def test_where_tokens_leave() -> None:
    assert {name: scheme_of(name).skips for name in MASKING} == {
        "deferred": "backbone",
        "naive": "network",
        "maskdit": "network",
        "block": "backbone",
        "tread": (1, 2),
    }


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [
        (256, 0.75, 64),
        (256, 0.5, 128),
        (256, 0.9, 25),
        (256, 0.6, 102),
        (256, 0.3, 179),
        (1024, 0.75, 256),
        (10, 0.9, 1),  # 10 * (1 - 0.9) is 0.9999999999999998 in floating point
        (10, 0.7, 3),
        (100, 0.42, 58),
        (256, 0.0, 256),
    ],
)
def test_number_of_kept_tokens(tokens: int, ratio: float, kept: int) -> None:
    assert kept_tokens(tokens, ratio) == kept


@pytest.mark.parametrize("name", MASKING)
@given(
    side=st.sampled_from([2, 4, 6, 8, 16]), hundredths=st.integers(0, 99), seed=st.integers(0, 9)
)
def test_kept_count_is_exact(name: str, side: int, hundredths: int, seed: int) -> None:
    """floor(T (1 - r)) in whole numbers, for cells of b x b: floor(T / b^2 (1 - r)) b^2."""
    unit = 4 if name == "block" else 1
    keep = side * side // unit * (100 - hundredths) // 100 * unit
    assume(keep > 0)
    scheme = scheme_of(name)
    assert scheme.kept(side * side, hundredths / 100) == keep
    mask = scheme.draw(noise(3, side * side, seed), hundredths / 100)
    if mask is None:
        assert keep == side * side
        return
    assert mask.ids_keep.shape == (3, keep)
    assert all(len(set(row)) == keep for row in mask.ids_keep.tolist())
    lost = 0 if name == "tread" else side * side - keep
    assert mask.mask.sum(dim=1).tolist() == [lost] * 3


@pytest.mark.parametrize("b", [2, 4, 8])
def test_cells_are_kept_or_dropped_whole(b: Literal[2, 4, 8]) -> None:
    numbers = noise(6, 256)
    mask = Block(mask_block=b).draw(numbers, 0.75)
    assert mask is not None
    assert mask.ids_keep.shape == (6, 64)
    grids = mask.mask.view(6, 16, 16).numpy()
    for grid, own in zip(grids, numbers.view(6, 16, 16).numpy(), strict=True):
        cells = grid.reshape(16 // b, b, 16 // b, b).swapaxes(1, 2).reshape(-1, b * b)
        assert (cells == cells[:, :1]).all()
        # Those with the smallest numbers, each cell's being that of its first token.
        kept = np.argsort(own[::b, ::b].ravel())[: 64 // (b * b)]
        assert set(np.flatnonzero(cells[:, 0] == 0)) == set(kept)


def test_cells_with_the_same_number_do_not_share_places() -> None:
    mask = Block(mask_block=2).draw(torch.zeros(1, 16), 0.5)
    assert mask is not None
    assert mask.mask.view(4, 4).tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_outside_the_range_is_refused(name: str, ratio: float) -> None:
    with pytest.raises(ValueError, match=r"^mask_ratio "):
        scheme_of(name).draw(noise(2, 16), ratio)


def test_ratio_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keeps none of 16 patches; at most 0\.9375"):
        Deferred().draw(noise(2, 16), 0.95)
    assert Deferred().draw(noise(2, 16), 0.9375) is not None
    with pytest.raises(ValueError, match=r"keeps none of 4 cells; at most 0\.75"):
        Block(mask_block=2).draw(noise(2, 16), 0.9)


def test_cells_that_do_not_tile_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask_block 4: does not divide the 6 x 6 patches"):
        Block(mask_block=4).kept(36, 0.5)


def test_ties_fall_to_the_first_token() -> None:
    mask = Deferred().draw(torch.zeros(1, 8), 0.5)
    assert mask is not None
    assert mask.ids_keep.tolist() == [[0, 1, 2, 3]]


def test_restore_inverts_keep() -> None:
    mask = Deferred().draw(noise(3, 16), 0.75)
    assert mask is not None
    x = torch.randn(3, 16, 5)
    fill = torch.full((1, 1, 5), 7.0)
    expected = torch.where(mask.mask[..., None].bool(), fill, x)
    assert torch.equal(mask.restore(mask.keep(x), fill), expected)


def test_rejoin_puts_kept_tokens_back_among_the_others() -> None:
    mask = Deferred().draw(noise(3, 16), 0.75)
    assert mask is not None
    x, bypassed = torch.randn(2, 3, 16, 5, requires_grad=True)
    expected = torch.where(mask.mask[..., None].bool(), bypassed, x)
    actual = mask.rejoin(mask.keep(x), bypassed)
    assert torch.equal(actual, expected)
    direction = torch.randn(3, 16, 5)
    gradients = torch.autograd.grad(actual, (x, bypassed), direction)
    wanted = torch.autograd.grad(expected, (x, bypassed), direction)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


def test_gradient_reaches_kept_tokens_only() -> None:
    mask = Deferred().draw(noise(3, 16), 0.75)
    assert mask is not None
    x = torch.randn(3, 16, 5, requires_grad=True)
    mask.restore(mask.keep(x), torch.zeros(1, 1, 5)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (1 - mask.mask)[..., None].expand_as(x))


@pytest.mark.parametrize("name", MASKS)
def test_every_scheme_keeps_all_at_ratio_zero(name: str) -> None:
    assert scheme_of(name).draw(noise(2, 16), 0.0) is None


@pytest.mark.parametrize("name", MASKING)
def test_masks_do_not_depend_on_the_global_generator(name: str) -> None:
    masks = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        masks.append(scheme_of(name).draw(noise(4, 64), 0.75))
        assert torch.equal(before, torch.get_rng_state())
    assert masks[0] is not None
    assert torch.equal(masks[0].ids_keep, masks[1].ids_keep)


def test_scheme_none_refuses_a_ratio() -> None:
    with pytest.raises(ValueError, match=r"mask_ratio 0\.75 with mask none"):
        scheme_of("none").draw(noise(2, 16), 0.75)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("defered", {}, 'mask defered: unknown; did you mean "deferred"?'),
        ("block", {}, "mask block without mask_block: give one, e.g. mask_block: 2"),
        ("naive", {"mask_block": 4}, "mask_block 4 with mask naive, which has no use for it"),
        ("tread", {"tread_blocks": (3, 2)}, r"tread_blocks \[3, 2\]: give the first and the last"),
        ("tread", {"tread_blocks": (-1, 2)}, r"tread_blocks \[-1, 2\]: give the first and the"),
    ],
)
def test_settings_a_scheme_cannot_have(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_scheme(name, settings)


def test_networks_a_scheme_cannot_train() -> None:
    with pytest.raises(ValueError, match=r"tread_blocks \[1, 2\]: the backbone's last block is 1"):
        scheme_of("tread").check(DiTConfig(depth=2))
    scheme_of("tread").check(DiTConfig(depth=3))
    with pytest.raises(ValueError, match=r"mask maskdit without a decoder: set model\.d"):
        scheme_of("maskdit").check(DiTConfig())
    scheme_of("maskdit").check(DiTConfig(decoder_depth=1))


def test_every_file_is_in_the_table() -> None:
    files = {p.stem for p in ROOT.glob("training/masking/*.py")}
    named = {target.split(":")[0].split(".")[-1] for target in MASKS.values()}
    assert files - named == {"__init__", "scheme", "ratio"}


# --- ratio over a stage


def schedule(**settings: object) -> RatioSchedule:
    given = {"from": 0.75, "to": 0.0, "steps": 800, "levels": 8} | settings
    return RatioSchedule.model_validate(given)


def test_linear_schedule_goes_down_in_equal_jumps_and_stays() -> None:
    linear = schedule()
    levels = [linear.at(step) for step in range(0, 800, 100)]
    assert levels == pytest.approx(np.linspace(0.75, 0, 8))
    assert (levels[0], levels[-1]) == (0.75, 0.0)
    assert {linear.at(step) for step in range(300, 400)} == {levels[3]}
    assert linear.at(800) == linear.at(10_000) == 0.0


def test_cosine_schedule_lingers_at_both_ends() -> None:
    """(1 - cos(pi u)) / 2 of the way at the share u of the steps."""
    cosine = schedule(shape="cosine")
    counts = list(ratio_steps(cosine, 800).values())
    edges = 800 * np.arccos(1 - 2 * np.arange(9) / 8) / np.pi
    assert counts == pytest.approx(np.diff(edges), abs=1)
    assert min(counts[0], counts[-1]) > 2 * counts[3]


@given(
    start=st.integers(0, 99),
    to=st.integers(0, 99),
    levels=st.integers(2, 64),
    steps=st.integers(64, 500),
    more=st.integers(0, 100),
    shape=st.sampled_from(["linear", "cosine"]),
)
def test_steps_by_ratio_are_counted_exactly(
    start: int, to: int, levels: int, steps: int, more: int, shape: str
) -> None:
    assume(start != to)
    ratios = {"from": start / 100, "to": to / 100}
    ramp = schedule(**ratios, levels=levels, steps=steps, shape=shape)
    counted: dict[float, int] = {}
    for step in range(steps + more):
        counted[ratio_at(ramp, step)] = counted.get(ratio_at(ramp, step), 0) + 1
    assert ratio_steps(ramp, steps + more) == counted
    assert next(iter(counted)) == start / 100
    assert len(counted) <= levels
    way = list(counted)
    assert way == sorted(way, reverse=start > to)


def test_a_number_is_a_schedule_of_one_level() -> None:
    assert ratio_at(0.5, 17) == 0.5
    assert ratio_steps(0.5, 100) == {0.5: 100}


NEW_SCHEME = """
from dataclasses import dataclass, field
from typing import Literal
from training.masking.scheme import Scheme

@dataclass(frozen=True)
class Rows(Scheme):
    rows_kept: int = field(metadata={"example": 3})
    rows_order: Literal["up", "down"] = "up"
"""
USE = """
import sys
from training.masking import MASKS
MASKS["rows"] = "rows:Rows"
from pipeline.core.errors import SettingError
from training.config.load import resolve
from training.config.stage_settings import StageSettings
stage = {"steps": 9, "resolution": 64, "batch_size": 8, "lr": 1e-3, "mask": "rows"}
found = StageSettings(**stage, rows_kept=3)
print(found.scheme(), found.rows_order)
for change in ({}, {"rows_kept": "3"}, {"rows_kept": 3, "rows_ordr": "up"}, {"mask_block": 2}):
    raw = {"name": "x", "data": {"sources": ["s"], "vae": "v", "text_encoder": "t"}}
    raw |= {"model": {"arch": "custom"}, "stages": {"one": stage | change}}
    try:
        resolve(raw)
    except SettingError as error:
        print(error)
assert "torch" not in sys.modules
"""


def test_a_scheme_with_settings_is_a_file_and_a_line(tmp_path: Path) -> None:
    """Its settings are a stage's, of its types, without a word elsewhere."""
    (tmp_path / "rows.py").write_text(NEW_SCHEME)
    result = subprocess.run(
        [sys.executable, "-c", USE],
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [
        "Rows(rows_kept=3, rows_order='up') None",
        "stages.one: mask rows without rows_kept: give one, e.g. rows_kept: 3",
        "stages.one.rows_kept='3': input should be a valid integer",
        'stages.one.rows_ordr: unknown key; did you mean "rows_order"?',
        "stages.one: mask_block 2 with mask rows, which has no use for it: remove it",
    ]


def test_the_published_codes_route() -> None:
    """TREAD's rule for B blocks is 2 to B - 4, both included: three blocks after it are dense."""
    tiny = load([str(ROOT / "yamls/ablations/tread.yaml")])
    depth = MODELS["MicroDiT_Tiny_2"].depth
    assert tiny.stages["256-masked"].scheme() == Tread((2, depth - 4))
    with pytest.raises(ValueError, match=r"give one, e\.g\. tread_blocks: \[2, 24\]$"):
        make_scheme("tread")
    assert MODELS["MicroDiT_XL_2"].depth - 4 == 24

"""Masks equal a transcription of their definition; dropping and putting back are inverse."""

import pkgutil

import numpy as np
import pytest
import torch

from training.masking import MASKS
from training.masking.deferred import draw, kept_tokens
from training.masking.tokens import TokenMask


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


def noise(batch: int, tokens: int) -> torch.Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize(("tokens", "ratio"), [(16, 0.75), (64, 0.5), (256, 0.9), (9, 0.1)])
def test_equals_reference(tokens: int, ratio: float) -> None:
    numbers = noise(5, tokens)
    mask = draw(numbers, ratio)
    assert mask is not None
    expected = reference(numbers.numpy(), kept_tokens(tokens, ratio))
    for actual, wanted in zip((mask.ids_keep, mask.ids_restore, mask.mask), expected, strict=True):
        assert actual.numpy().dtype == wanted.dtype
        np.testing.assert_array_equal(actual.numpy(), wanted)


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


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_outside_the_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"mask ratio .*\[0, 1\)"):
        draw(noise(2, 16), ratio)


def test_ratio_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keeps none of 16 tokens, choose at most 0\.9375"):
        draw(noise(2, 16), 0.95)
    assert draw(noise(2, 16), 0.9375) is not None


def test_ties_fall_to_the_first_token() -> None:
    mask = draw(torch.zeros(1, 8), 0.5)
    assert mask is not None
    assert mask.ids_keep.tolist() == [[0, 1, 2, 3]]


def test_restore_inverts_keep() -> None:
    mask = draw(noise(3, 16), 0.75)
    assert mask is not None
    x = torch.randn(3, 16, 5)
    fill = torch.full((1, 1, 5), 7.0)
    expected = torch.where(mask.mask[..., None].bool(), fill, x)
    assert torch.equal(mask.restore(mask.keep(x), fill), expected)


def test_gradient_reaches_kept_tokens_only() -> None:
    mask = draw(noise(3, 16), 0.75)
    assert mask is not None
    x = torch.randn(3, 16, 5, requires_grad=True)
    mask.restore(mask.keep(x), torch.zeros(1, 1, 5)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (1 - mask.mask)[..., None].expand_as(x))


@pytest.mark.parametrize("name", MASKS)
def test_every_scheme_keeps_all_at_ratio_zero(name: str) -> None:
    assert pkgutil.resolve_name(MASKS[name])(noise(2, 16), 0.0) is None


@pytest.mark.parametrize("name", sorted(MASKS.keys() - {"none"}))
def test_every_masking_scheme_drops_the_share_it_is_asked_for(name: str) -> None:
    mask = pkgutil.resolve_name(MASKS[name])(noise(2, 16), 0.75)
    assert isinstance(mask, TokenMask)
    assert mask.ids_keep.shape == (2, 4)
    assert mask.mask.sum(dim=1).tolist() == [12, 12]


def test_scheme_none_refuses_a_ratio() -> None:
    with pytest.raises(ValueError, match=r"mask ratio 0\.75 with scheme 'none'"):
        pkgutil.resolve_name(MASKS["none"])(noise(2, 16), 0.75)

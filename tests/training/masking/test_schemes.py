"""Masks tell the truth: network and loss under every scheme equal ten lines of NumPy each.

The transcriptions say which tokens go where and what counts; the blocks they run are the network's
own, which `test_vectors.py` compares with the official ones. All in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.training.helpers.networks import SMALL, random_model, scheme_settings
from training.masking import MASKS
from training.masking.ratio import RatioSchedule
from training.masking.scheme import make_scheme
from training.model import DiffusionModel, Objective
from training.network.decoder import DecoderBlock
from training.network.dit import MicroDiT, Text
from training.network.recompute import Normed
from training.objectives.denoiser import Denoiser
from training.objectives.edm import EDM
from training.objectives.flow import Flow
from training.objectives.sampler import sample
from training.randomness import Draws, Rows, draw

Array = NDArray[Any]
SIZES = {
    "naive": {"mixer_depth": 0},
    "maskdit": {"mixer_depth": 0, "decoder_width": 32, "decoder_depth": 2},
}
MASKING = sorted(MASKS.keys() - {"none"})
BATCH, RATIO = 3, 0.75


def network_of(name: str, **sizes: Any) -> MicroDiT:
    return random_model(dataclasses.replace(SMALL, **{**SIZES.get(name, {}), **sizes}))


def batch_of(size: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(size, 4, 8, 8, generator=generator, dtype=torch.float64),
        "y": torch.randn(size, 7, 24, generator=generator, dtype=torch.float64),
        "drop": torch.ones(size),
        "index": torch.arange(size),
    }


def model_of(network: MicroDiT, name: str, ratio: float | RatioSchedule = RATIO) -> DiffusionModel:
    objective = Objective(
        denoiser=EDM(),
        mask=make_scheme(name, scheme_settings(name)),
        mask_ratio=ratio,
        caption_drop=0.0,
        seed=0,
        stage="s",
        batch_size=BATCH,
        rows=Rows(),
    )
    return DiffusionModel(network, objective)


def draws_of() -> Draws:
    return draw((0, "s", 0), BATCH, (4, 8, 8), 16, Rows(), torch.device("cpu"))


# --- transcriptions


@dataclasses.dataclass
class Parts:
    """A network's parts as functions of arrays, for given captions and noise levels."""

    net: MicroDiT
    text: Text
    condition: Tensor

    def run(self, module: Any, x: Array, *more: Any) -> Array:
        return module(torch.from_numpy(x), *more).numpy()

    def embed(self, x: Array) -> Array:
        return self.run(self.net.x_embedder, x) + self.net.pos_embed.numpy()

    def mix(self, h: Array) -> Array:
        h = self.run(self.net.patch_mixer_map_xin, h)
        for block, caption in zip(self.net.patch_mixer, self.text.mixer, strict=True):
            h = self.run(block, h, self.condition, caption, None)
        return h

    def blocks(self, h: Array, which: Iterable[int] = range(4)) -> Array:
        for i in which:
            h = self.run(self.net.blocks[i], h, self.condition, self.text.backbone[i], None)
        return h

    def project(self, h: Array) -> Array:
        return self.run(self.net.patch_mixer_map_xout, h)

    def final(self, h: Array) -> Array:
        return self.run(self.net.final_layer, h, self.condition)


At = tuple[Array, Array]  # row and token index of the kept tokens, (B, 1) and (B, K)


def filled(at: At, values: Array, fill: Array | float) -> Array:
    full = np.zeros((len(values), 16, values.shape[-1])) + fill
    full[at] = values
    return full


def deferred(parts: Parts, x: Array, at: At) -> Array:
    h = parts.mix(parts.embed(x))
    return filled(at, parts.final(parts.blocks(parts.project(h[at]))), 0)


def naive(parts: Parts, x: Array, at: At) -> Array:
    h = parts.project(parts.mix(parts.embed(x)[at]))
    return filled(at, parts.final(parts.blocks(h)), 0)


def tread(parts: Parts, x: Array, at: At) -> Array:
    h = parts.blocks(parts.project(parts.mix(parts.embed(x))), [0])
    h = filled(at, parts.blocks(h[at], [1, 2]), h)
    return parts.final(parts.blocks(h, [3]))


def maskdit(parts: Parts, x: Array, at: At) -> Array:
    h, decoder = parts.blocks(parts.embed(x)[at]), parts.net.decoder
    assert decoder is not None
    entry = decoder.entry
    shift, scale = np.split(parts.run(entry.adaLN_modulation, parts.condition.numpy()), 2, axis=1)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    h = h * (1 + scale[:, None]) + shift[:, None]
    h = h @ entry.linear.weight.numpy().T + entry.linear.bias.numpy()
    h = filled(at, h, decoder.mask_token.numpy()) + decoder.pos_embed.numpy()
    for block in cast(Iterable[DecoderBlock], decoder.blocks):
        six = block.adaLN_modulation(parts.condition)[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift2, scale2, gate2 = six
        read = Normed(torch.from_numpy(h), block.norm1, shift, scale)
        h = h + (gate * block.attn(read)).numpy()
        read = Normed(torch.from_numpy(h), block.norm2, shift2, scale2)
        h = h + (gate2 * block.mlp(read)).numpy()
    return parts.final(h)


def patches(x: Array) -> Array:
    """(B, 4, 8, 8) -> (B, 16, 16), values as the final layer gives them: row, column, channel."""
    return x.reshape(-1, 4, 4, 2, 4, 2).transpose(0, 2, 4, 3, 5, 1).reshape(-1, 16, 16)


def edm_error(predict: Callable[[Array, Array], Array], x: Array, sigma: Array, eps: Array):
    """EDM's weighted error of every value, and D and the noisy latents, in patches (B, T, ppC)."""
    s, data = sigma[:, None, None, None], 0.9
    noisy = x + s * eps
    c_in, c_skip = 1 / np.sqrt(s**2 + data**2), data**2 / (s**2 + data**2)
    c_out = s * data / np.sqrt(s**2 + data**2)
    denoised = patches(c_skip * noisy) + c_out[..., 0] * predict(c_in * noisy, np.log(sigma) / 4)
    weight = (s**2 + data**2) / (s * data) ** 2
    return weight[..., 0] * (denoised - patches(x)) ** 2, denoised, patches(noisy)


def reconstruction(denoised: Array, noisy: Array, dropped: Array) -> Array:
    """0.1 x error of dropped patches against the noisy input, each normalised to itself."""
    mean, variance = noisy.mean(-1, keepdims=True), noisy.var(-1, ddof=1, keepdims=True)
    error = ((denoised - (noisy - mean) / np.sqrt(variance + 1e-6)) ** 2).mean(-1)
    return 0.1 * np.array([e[d].mean() for e, d in zip(error, dropped, strict=True)])


FORWARD = {"deferred": deferred, "naive": naive, "maskdit": maskdit, "tread": tread}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("deferred", {}),
        ("naive", {}),
        ("naive", {"mixer_depth": 2}),
        ("maskdit", {}),
        ("tread", {}),
        ("tread", {"mixer_depth": 0}),
    ],
)
def test_loss_equals_the_transcription(name: str, sizes: dict[str, Any]) -> None:
    net, batch, draws = network_of(name, **sizes), batch_of(), draws_of()
    order = np.argsort(draws.mask.numpy(), axis=1)
    at = (np.arange(BATCH)[:, None], order[:, :4])
    dropped = np.ones((BATCH, 16), dtype=bool)
    dropped[at] = False

    def predict(x: Array, c_noise: Array) -> Array:
        text = net.encode_text(batch["y"])
        condition = net.t_embedder(torch.from_numpy(c_noise)) + text.pooled
        return FORWARD[name](Parts(net, text, condition), x, at)

    x, eps = batch["latents"].numpy(), draws.noise.numpy().astype(np.float64)
    sigma = np.exp(1.2 * draws.level.numpy() - 0.6).astype(np.float64)
    error, denoised, noisy = edm_error(predict, x, sigma, eps)
    counted = np.ones_like(dropped) if name == "tread" else ~dropped
    expected = np.array([e[c].mean() for e, c in zip(error, counted, strict=True)])
    if name == "maskdit":
        extra = reconstruction(denoised, noisy, dropped)
        assert (extra > 0.001 * expected).all()  # so that its absence would show
        expected = expected + extra
    loss = model_of(net, name)(batch)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-6)  # sigma is drawn in float32


# --- what masks promise


@torch.no_grad()
@pytest.mark.parametrize("name", MASKS)
def test_ratio_zero_equals_unmasked(name: str) -> None:
    net, batch = network_of(name), batch_of()
    assert torch.equal(model_of(net, name, 0.0)(batch), model_of(net, "none", 0.0)(batch))


@torch.no_grad()
@pytest.mark.parametrize("name", MASKING)
def test_loss_counts_the_patches_that_are_not_dropped(name: str) -> None:
    """A prediction that changes in one patch changes the loss only if the patch counts; in a
    dropped one it changes MaskDiT's loss by its reconstruction."""
    batch, draws = batch_of(), draws_of()
    scheme = make_scheme(name, scheme_settings(name))
    mask = scheme.draw(draws.mask, RATIO)
    assert mask is not None

    def loss(output: Tensor, extra: bool) -> Tensor:
        return EDM().loss(
            lambda *_, **__: output,
            batch["latents"],
            draws.level.exp(),
            draws.noise,
            batch["y"],
            mask=mask,
            extra=scheme.extra_loss() if extra else None,
        )

    plain = torch.zeros(BATCH, 4, 8, 8, dtype=torch.float64)
    lost = []
    for patch in range(16):
        changed = plain.clone()
        row, column = divmod(patch, 4)
        changed[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1.0
        same = loss(changed, extra=False) == loss(plain, extra=False)
        lost.append(same)
        differs = loss(changed, extra=True) != loss(plain, extra=True)
        assert differs.all() if name == "maskdit" else torch.equal(differs, ~same)
    assert torch.equal(torch.stack(lost, dim=1), mask.mask.bool())
    assert torch.stack(lost).sum() == (0 if name == "tread" else BATCH * 12)


@torch.no_grad()
@pytest.mark.parametrize("denoiser", [EDM(), Flow()], ids=lambda denoiser: denoiser.name)
def test_either_objective_reconstructs_its_own_noisy_input(denoiser: Denoiser) -> None:
    net, batch, draws = network_of("maskdit"), batch_of(), draws_of()
    scheme = make_scheme("maskdit")
    mask = scheme.draw(draws.mask, RATIO)
    extra = scheme.extra_loss()
    assert mask is not None
    assert extra is not None
    x, level, y = batch["latents"], denoiser.level(draws.level), batch["y"]
    s = level.double().view(-1, 1, 1, 1)
    noisy = (1 - s) * x + s * draws.noise if denoiser.name == "flow" else x + s * draws.noise
    expected = denoiser.loss(net, x, level, draws.noise, y, mask=mask)
    expected += extra(noisy, denoiser.denoise(net, noisy, level, y=y, mask=mask), mask)
    actual = denoiser.loss(net, x, level, draws.noise, y, mask=mask, extra=extra)
    torch.testing.assert_close(actual, expected)
    # Without a mask there is nothing to reconstruct.
    assert torch.equal(
        denoiser.loss(net, x, level, draws.noise, y, extra=extra),
        denoiser.loss(net, x, level, draws.noise, y),
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["naive", "maskdit"])
def test_dropped_patches_are_never_seen(name: str) -> None:
    net, batch, draws = network_of(name, mixer_depth=2), batch_of(), draws_of()
    mask = make_scheme(name).draw(draws.mask, RATIO)
    assert mask is not None
    dropped = mask.mask.view(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3).bool()
    x, level = batch["latents"], torch.zeros(BATCH, dtype=torch.float64)
    out = net(x, level, batch["y"], mask=mask)
    assert torch.equal(net(torch.where(dropped, x + 1, x), level, batch["y"], mask=mask), out)
    assert not torch.equal(net(torch.where(dropped, x, x + 1), level, batch["y"], mask=mask), out)
    # The decoder gives the dropped patches an output, without one they have none.
    assert bool((out.masked_select(dropped) == 0).all()) == (name == "naive")


@torch.no_grad()
def test_routed_tokens_are_seen_by_the_blocks_around() -> None:
    """No patch is without influence, and every patch has an output."""
    net, batch, draws = network_of("tread", mixer_depth=0), batch_of(), draws_of()
    mask = make_scheme("tread", scheme_settings("tread")).draw(draws.mask, RATIO)
    level = torch.zeros(BATCH, dtype=torch.float64)
    out = net(batch["latents"], level, batch["y"], mask=mask)
    assert (out != 0).all()
    assert not torch.allclose(out, net(batch["latents"], level, batch["y"]))
    for patch in range(16):
        changed = batch["latents"].clone()
        row, column = divmod(patch, 4)
        changed[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
        seen = net(changed, level, batch["y"], mask=mask)
        assert ((seen - out).abs() > 1e-6).flatten(1).sum(dim=1).min() > 16  # not its own alone


@torch.no_grad()
@pytest.mark.parametrize("name", MASKING)
def test_bfloat16_autocast_stays_close(name: str) -> None:
    # Without experts, whose choices bfloat16 may change; with a projection that autocast computes
    # in bfloat16, so that tokens which leave and rejoin have that precision too.
    net = network_of(name, moe_every=0, mixer_depth=2).float()
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch_of().items()}
    expected = model_of(net, name)(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model_of(net, name)(batch)
    assert (loss - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("name", "ratio"), [(name, 0.0) for name in MASKS] + [(name, RATIO) for name in MASKING]
)
def test_every_parameter_gets_a_gradient(name: str, ratio: float) -> None:
    """Ranks that train together wait for all of them."""
    net = network_of(name)
    model_of(net, name, ratio)(batch_of()).mean().backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", MASKS)
def test_a_network_learns_and_paints(name: str) -> None:
    """Through the real model and sampler; nothing is dropped when painting."""
    net = MicroDiT(dataclasses.replace(SMALL, **SIZES.get(name, {})))
    net.initialise(torch.Generator().manual_seed(0))
    model, batch = model_of(net, name, 0.0 if name == "none" else 0.5), batch_of()
    batch = {key: v.float() if v.is_floating_point() else v for key, v in batch.items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    losses = []
    for step in range(60):
        model.step = step % 4  # few noises, so that losses compare
        loss = model.loss(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    latents = sample(net.eval(), EDM(), draws_of().noise, batch["y"], steps=3, guidance=2.0)
    assert latents.shape == (BATCH, 4, 8, 8)
    assert latents.isfinite().all()
    assert torch.equal(state, torch.get_rng_state())


def test_ratio_follows_the_schedule_and_so_do_the_flops() -> None:
    schedule = RatioSchedule.model_validate({"from": 0.75, "to": 0.0, "steps": 4, "levels": 2})
    net, batch = network_of("deferred"), batch_of()
    moving = model_of(net, "deferred", schedule)
    for step in range(6):
        fixed = model_of(net, "deferred", 0.75 if step < 2 else 0.0)
        moving.step = fixed.step = step
        assert torch.equal(moving(batch), fixed(batch))
        assert moving.flops_per_batch(batch) == fixed.flops_per_batch(batch)

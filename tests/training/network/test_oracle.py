"""The network equals its plain transcription, in values and gradients, masked and not."""

import pytest
import torch

from tests.oracle import plain
from training.masking.scheme import make_scheme
from training.network.config import DiTConfig
from training.network.dit import MicroDiT
from training.objectives.edm import EDM

CONFIG = DiTConfig(
    input_size=16,
    width=64,
    depth=4,
    head_dim=16,
    multiple_of=32,
    mixer_width=48,
    mixer_depth=2,
    num_experts=4,
    caption_width=24,
    caption_length=7,
)


@pytest.mark.parametrize("mixer_width", [48, 64])
@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_equals_the_plain_transcription(ratio: float, mixer_width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    network = MicroDiT(
        DiTConfig(**{**CONFIG.__dict__, "mixer_width": mixer_width})  # 64: no projections between
    )
    for parameter in network.parameters():  # no zero gates: every branch counts
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    oracle = plain(network)
    latents = torch.randn(3, 4, 16, 16, generator=generator)
    noise = torch.rand(3, network.config.tokens, generator=generator)
    eps = torch.randn(latents.shape, generator=generator)
    y = torch.randn(3, 7, 24, generator=generator)
    sigma = torch.tensor([0.3, 1.0, 4.0])
    mask = make_scheme("deferred").draw(noise, ratio)

    edm = EDM()
    ours = edm.loss(network, latents, sigma, eps, y, mask=mask)

    def transcribed(x, c_noise, y, **_):
        return oracle(x, c_noise, y, noise if ratio else None, ratio)[0]

    theirs = edm.loss(transcribed, latents, sigma, eps, y, mask=mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.mean().backward()
    theirs.mean().backward()
    found = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        stem, _, leaf = name.rpartition(".")
        head, _, last = stem.rpartition(".")
        parts = {"qkv": "qkv", "kv_linear": "kv", "q_linear": "q"}.get(last)
        names = [f"{head}.{part}.{leaf}" for part in parts] if parts else [name]
        expected = torch.cat([found[n] for n in names])
        scale = expected.abs().max()
        assert scale > 0, name
        error = (parameter.grad - expected).abs().max() / scale
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_drops_the_same_patches() -> None:
    oracle = plain(MicroDiT(CONFIG))
    noise = torch.rand(2, CONFIG.tokens, generator=torch.Generator().manual_seed(0))
    x, y = torch.zeros(2, 4, 16, 16), torch.zeros(2, 7, 24)
    _, dropped = oracle(x, torch.zeros(2), y, noise, 0.75)
    mask = make_scheme("deferred").draw(noise, 0.75)
    assert mask is not None
    assert torch.equal(dropped, mask.mask)

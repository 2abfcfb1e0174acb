"""The network's forward and backward against its plain transcription, eager on this machine's CPU.

On a GPU: `python -m benchmarks.gpu`, which needs nothing but torch.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.rows import REPEATS, Row, seconds
from tests.oracle import plain
from training.masking.scheme import make_scheme
from training.network.config import DiTConfig
from training.network.dit import MicroDiT
from training.objectives.edm import EDM

#: name -> (latent side, share of dropped patches, batch): the two settings that are claimed first.
SETTINGS = {
    "256 px masked": (32, 0.75, 16),
    "512 px full": (64, 0.0, 2),
    "256 px full": (32, 0.0, 8),
    "512 px masked": (64, 0.75, 4),
}
FASTER, MEMORY = 1.15, 0.60
CLAIMED = ("256 px masked", "512 px full")


def quarter(side: int) -> DiTConfig:
    """MicroDiT_XL_2 at a quarter of every width, as many blocks, heads and experts."""
    return DiTConfig(
        input_size=side,
        width=256,
        depth=28,
        head_dim=16,
        multiple_of=64,
        mixer_width=192,
        mixer_depth=6,
        caption_width=256,
    )


def rows() -> Iterator[Row]:
    for name, setting in SETTINGS.items():
        ours, theirs = steps(*setting)
        for step in (ours, theirs):
            step()
        pairs = [(seconds(theirs), seconds(ours)) for _ in range(REPEATS)]
        ratios = [a / b for a, b in pairs]
        speed = setting[2] / statistics.median(b for _, b in pairs)
        ratio, claimed = statistics.median(ratios), name in CLAIMED
        yield Row(
            f"forward and backward of a quarter-width XL, {name}, eager, against the plain layers",
            f"{ratio:.2f}× ({min(ratios):.2f}–{max(ratios):.2f}; {speed:.2f} pictures/s)",
            f"at least {FASTER}×" if claimed else "",
            not claimed or ratio >= FASTER,
        )
    ours, theirs = (_peak(which) for which in ("ours", "plain"))
    yield Row(
        "memory of that step at 512 px full, above the weights",
        f"{ours / theirs:.0%} ({ours / 1e6:.0f} against {theirs / 1e6:.0f} MB)",
        f"at most {MEMORY:.0%}",
        ours / theirs <= MEMORY,
    )


def steps(
    side: int, ratio: float, batch: int, device: str = "cpu"
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Forward and backward of the EDM loss: ours, and with the plain transcription's network."""
    network = MicroDiT(quarter(side)).to(device)
    config = network.config
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    with torch.no_grad():  # no zero gates: they would spare a backward nothing, but values vary
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.02, generator=generator)
    oracle = plain(network).to(device)
    latents, eps = (normal(batch, config.in_channels, side, side) for _ in range(2))
    y = normal(batch, config.caption_length, config.caption_width)
    sigma = normal(batch).exp()
    noise = torch.rand(batch, config.tokens, generator=generator, device=device)
    edm, scheme = EDM(), make_scheme("deferred")

    def ours() -> Tensor:
        mask = scheme.draw(noise, ratio)
        return _step(network, edm.loss(network, latents, sigma, eps, y, mask=mask))

    def theirs() -> Tensor:
        def transcribed(x: Tensor, c_noise: Tensor, y: Tensor, **_: object) -> Tensor:
            return oracle(x, c_noise, y, noise if ratio else None, ratio)[0]

        mask = scheme.draw(noise, ratio)
        return _step(oracle, edm.loss(transcribed, latents, sigma, eps, y, mask=mask))

    return ours, theirs


def _step(network: nn.Module, loss: Tensor) -> Tensor:
    loss.mean().backward()
    network.zero_grad(set_to_none=True)
    return loss.detach()


def _peak(which: str) -> int:
    """Bytes: a process of its own has a peak of its own."""
    code = f"import resource, sys; from benchmarks import model\nprint(model.peak({which!r}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(found.stdout)


def peak(which: str) -> int:
    """How far a step raises the memory of the process, bytes; Linux counts from a reset on."""
    side, ratio, batch = SETTINGS["512 px full"]
    ours, theirs = steps(side, ratio, batch)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    (ours if which == "ours" else theirs)()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

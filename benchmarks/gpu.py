"""The network on a CUDA GPU: `python -m benchmarks.gpu`. Needs this repository and torch >= 2.6.

MicroDiT_XL_2 in bf16 autocast, blocks compiled, against its plain transcription compiled as a
whole; then how much of the GPU's peak a training step reaches, and whether four times the official
microbatch fits. Writes out/gpu.json.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.rows import REPEATS, Row, show
from tests.oracle import plain
from training.flops import flops_per_image
from training.masking.scheme import make_scheme
from training.network.config import MODELS, DiTConfig
from training.network.dit import MicroDiT
from training.objectives.edm import EDM

#: name -> (latent side, share of dropped patches, microbatch, wanted MFU). Official microbatches
#: are 256, 64, 32 and 16 a GPU.
STAGES = {
    "256 px masked": (32, 0.75, 256, 0.30),
    "256 px full": (32, 0.0, 64, 0.40),
    "512 px masked": (64, 0.75, 64, 0.40),
    "512 px full": (64, 0.0, 64, 0.40),
}
FASTER = 1.5
#: Dense bf16 FLOP/s by what the card's name holds (data sheets of NVIDIA).
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
STEP_PASSES, STEPS = 3, 10


def rows(device: str = "cuda", arch: str = "MicroDiT_XL_2") -> Iterator[Row]:
    peak = next((v for k, v in PEAKS.items() if device == "cuda" and k in card()), None)
    for name, (side, ratio, batch, wanted) in STAGES.items():
        config = dataclasses.replace(MODELS[arch], input_size=side, pos_interp_scale=side / 32)
        try:
            ours = _rate(_ours(config, ratio, batch, device), batch, device)
        except torch.OutOfMemoryError:
            yield Row(f"{arch}, {name}, {batch} pictures a step", "out of memory", "fits", False)
            continue
        flops = STEP_PASSES * flops_per_image(config, ratio) * ours
        memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
        mfu = flops / peak if peak else None
        share = f", {mfu:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak and mfu else ""
        yield Row(
            f"{arch}, {name}, forward, backward and AdamW, {batch} pictures a step, bf16, compiled",
            f"{ours:.0f} pictures/s, {flops / 1e12:.0f} TFLOP/s{share}, {memory:.0f} GB",
            f"at least {wanted:.0%} MFU" if peak else "",
            mfu is None or mfu >= wanted,
        )
        yield _against_plain(config, name, ratio, batch, device, ours)


def _against_plain(
    config: DiTConfig, name: str, ratio: float, batch: int, device: str, ours: float
) -> Row:
    claim = f"the same against the plain layers, compiled too ({name})"
    while batch:
        try:
            theirs = _rate(_plain(config, ratio, batch, device), batch, device)
        except torch.OutOfMemoryError:
            batch //= 2
            continue
        text = f"{ours / theirs:.2f}× (theirs: {theirs:.0f} pictures/s, {batch} a step)"
        return Row(claim, text, f"at least {FASTER}×", ours / theirs >= FASTER)
    return Row(claim, "theirs does not fit at all", "", True)


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"


def _rate(step: Callable[[], Tensor], batch: int, device: str) -> float:
    """Pictures a second, the median of several runs of some steps; the first ones compile."""
    for _ in range(3):
        step()
    rates = []
    for _ in range(REPEATS):
        began = _now(device)
        for _ in range(STEPS):
            step()
        rates.append(STEPS * batch / (_now(device) - began))
    return statistics.median(rates)


def _now(device: str) -> float:
    import time

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _ours(config: DiTConfig, ratio: float, batch: int, device: str) -> Callable[[], Tensor]:
    network = MicroDiT(config).to(device)
    network.compile_blocks("inductor" if device == "cuda" else "eager")
    return _step(network, network, config, ratio, batch, device, takes_noise=False)


def _plain(config: DiTConfig, ratio: float, batch: int, device: str) -> Callable[[], Tensor]:
    oracle = plain(MicroDiT(config)).to(device)
    forward = torch.compile(oracle, backend="inductor" if device == "cuda" else "eager")
    return _step(oracle, forward, config, ratio, batch, device, takes_noise=True)


def _step(
    network: nn.Module,
    forward: Callable,
    config: DiTConfig,
    ratio: float,
    batch: int,
    device: str,
    takes_noise: bool,
) -> Callable[[], Tensor]:
    """A training step: noise, EDM loss, backward, AdamW."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    latents = torch.randn(shape, device=device)
    y = torch.randn(batch, config.caption_length, config.caption_width, device=device)
    edm, scheme = EDM(), make_scheme("deferred")

    def step() -> Tensor:
        sigma = edm.level(torch.randn(batch, device=device))
        noise = torch.rand(batch, config.tokens, device=device)
        mask = scheme.draw(noise, ratio)

        def masked(x: Tensor, c_noise: Tensor, y: Tensor, **conditions: object) -> Tensor:
            if not takes_noise:
                return forward(x, c_noise, y, **conditions)
            return forward(x, c_noise, y, noise if ratio else None, ratio)[0]

        with torch.autocast(device, torch.bfloat16):
            eps = torch.randn_like(latents)
            loss = edm.loss(masked, latents, sigma, eps, y, mask=mask).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu: no CUDA device here; on this processor run `python -m benchmarks model`")
    torch.backends.cuda.matmul.allow_tf32 = True
    print(f"{card()}, torch {torch.__version__}")
    show(rows(), Path("out", "gpu.json"))


if __name__ == "__main__":
    main()

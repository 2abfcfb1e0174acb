"""Trains `tiny4` or `tiny16`: a small AutoencoderKL (8x down) of the architecture SDXL's VAE has.

    python -m pipeline.tiny.train_vae --channels 4 --out pipeline/encoders/weights/tiny4

Data: about 3,700 OpenMoji on random plain backgrounds, random 64 px crops of 128 px renders, flips.
Loss: L1 + 2 MSE + 5e-4 KL (per latent element; high enough that the latent space is smooth, which a
small diffusion model needs more than the last half decibel). Scale and shift make the stored
latents zero-mean and unit-variance over the training pictures and go into the config, like SDXL's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from pipeline.sources.openmoji import BACKGROUNDS
from pipeline.tiny.pictures import all_names, composite, glyph_split, sheet

SIZE, CROP = 128, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--channels", type=int, choices=(4, 16), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    names = {s: [n for n in all_names() if glyph_split(n) == s] for s in ("train", "test")}
    pictures = {s: sheet(names[s], SIZE) for s in names}
    architecture: dict[str, Any] = {
        "block_out_channels": (16, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": args.channels,
        "mid_block_add_attention": False,
        "sample_size": SIZE,
    }
    vae: Any = AutoencoderKL(**architecture)
    parameters = sum(p.numel() for p in vae.parameters())
    print(f"{parameters:,} parameters, {len(names['train'])} glyphs, {args.steps} steps")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=args.steps, pct_start=0.05
    )
    start = time.time()
    for step in range(1, args.steps + 1):
        x = crops(pictures["train"], args.batch)
        # bfloat16 convolutions are 1.5x faster where the CPU has them; the loss stays float32.
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x, return_dict=False)[0]
            y = vae.decode(posterior.sample(), return_dict=False)[0]
        y = y.float()
        kl = -0.5 * (1 + posterior.logvar - posterior.mean**2 - posterior.logvar.exp()).mean()
        loss = F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 5e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == args.steps:
            seconds = time.time() - start
            print(
                f"step {step} loss {loss.item():.4f} kl {kl.item():.2f} "
                f"psnr test {psnr(vae, pictures['test'][:32]):.2f} dB {seconds:.0f} s",
                flush=True,
            )
    vae.eval()
    mean, std = statistics(vae, pictures["train"][::4])
    vae.register_to_config(scaling_factor=round(1 / std, 5), shift_factor=round(mean, 5))
    args.out.mkdir(parents=True, exist_ok=True)
    vae.half().save_pretrained(args.out)
    vae.float()
    report = {
        "data": "OpenMoji 17.0.0 (CC BY-SA 4.0) on random plain backgrounds",
        "parameters": parameters,
        "steps": args.steps,
        "minutes": round((time.time() - start) / 60, 1),
        "psnr_test_db": round(psnr(vae, pictures["test"]), 2),
        "test_glyphs": len(names["test"]),
        "licence": "CC BY-SA 4.0 (trained on OpenMoji)",
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def crops(pictures: torch.Tensor, batch: int) -> torch.Tensor:
    """Random flipped CROP x CROP windows on random backgrounds -> (B, 3, CROP, CROP) in [-1, 1]."""
    rows = torch.randint(len(pictures), (batch,))
    corners = torch.randint(SIZE - CROP + 1, (batch, 2))
    windows = [
        pictures[r, y : y + CROP, x : x + CROP]
        for r, (y, x) in zip(rows.tolist(), corners.tolist(), strict=True)
    ]
    x = composite(torch.stack(windows), random_backgrounds(batch))
    return torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x, x.flip(-1))


def random_backgrounds(batch: int) -> torch.Tensor:
    """(B, 3) in 0..255: half the named backgrounds of the source, half any colour."""
    named = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
    chosen = named[torch.randint(len(named), (batch,))]
    return torch.where(torch.rand(batch, 1) < 0.5, chosen, torch.rand(batch, 3) * 255)


@torch.no_grad()
def psnr(vae: Any, pictures: torch.Tensor) -> float:
    """Mean PSNR (dB, 8-bit scale) of whole pictures through the posterior mean."""
    named = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
    values = []
    for start in range(0, len(pictures), 16):
        part = pictures[start : start + 16]
        x = composite(part, named[(torch.arange(len(part)) + start) % len(named)])
        posterior = vae.encode(x, return_dict=False)[0]
        y = vae.decode(posterior.mean, return_dict=False)[0].clamp(-1, 1)
        mse = ((y - x) ** 2).mean((1, 2, 3)) / 4
        values.append(-10 * mse.log10())
    return torch.cat(values).mean().item()


@torch.no_grad()
def statistics(vae: Any, pictures: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the latents of whole pictures."""
    latents = []
    for start in range(0, len(pictures), 16):
        part = pictures[start : start + 16]
        x = composite(part, random_backgrounds(len(part)))
        latents.append(vae.encode(x, return_dict=False)[0].mean)
    z = torch.cat(latents)
    return z.mean().item(), z.std().item()


if __name__ == "__main__":
    main()

"""What a run will cost: parameters, FLOPs, bytes, GPU-hours. Works with and without data."""

from __future__ import annotations

from collections.abc import Callable

import yaml

from pipeline.core.tokens import row_bytes
from training.config.plan import TrainingPlan, TrainingSource, network_config
from training.config.stage_settings import StageSettings
from training.flops import flops_per_image, num_parameters
from training.masking.ratio import ratio_steps
from training.network.config import DiTConfig

STEP_PASSES = 3  # a training step costs three forward passes: forward, and twice that backward
FLOAT16 = 2  # bytes


def report(plan: TrainingPlan) -> str:
    """The resolved config as YAML, then a table of the stages and the total."""
    config = plan.config
    networks = {name: network_config(plan, stage) for name, stage in config.stages.items()}
    lines = [
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100).rstrip(),
        "",
        f"parameters: {num_parameters(next(iter(networks.values()))):,}",
        f"vae: {plan.vae.name}, {plan.vae.channels} channels, 1/{plan.vae.downsample} of the side; "
        f"text: {plan.text.name}, {config.data.text}, up to {plan.text.length} x {plan.text.width}",
        "",
        f"{'stage':<14}{'steps':>9}{'images':>13}{'GFLOP/image':>13}{'bytes/sample':>14}"
        f"{'FLOPs':>11}{'GPU-hours':>12}",
    ]
    total = 0.0
    for name, stage in config.stages.items():
        rows = round(_rows(plan, name))
        forward = forward_flops(networks[name], stage, rows)
        flops = STEP_PASSES * forward * stage.steps * stage.batch_size
        total += flops
        lines.append(
            f"{name:<14}{stage.steps:>9,}{stage.steps * stage.batch_size:>13,}"
            f"{forward / 1e9:>13.4g}{_bytes(plan, name):>14,.0f}"
            f"{flops:>11.3g}{_hours(plan, flops):>12,.3g}"
        )
    hours, estimate = _hours(plan, total), config.estimate
    lines += [
        "",
        f"total: {total:.4g} FLOPs (3 x forward). On {estimate.gpu}s of {estimate.peak_tflops:g} "
        f"TFLOP/s at {estimate.mfu:.0%} MFU and ${estimate.dollars_per_gpu_hour:g} an hour: "
        f"{hours:,.3g} GPU-hours, ${hours * estimate.dollars_per_gpu_hour:,.4g}",
        _data_line(plan),
    ]
    return "\n".join(lines)


def forward_flops(network: DiTConfig, stage: StageSettings, rows: int) -> float:
    """Forward FLOPs of an image, the mean over the stage's steps."""
    scheme = stage.scheme()
    return sum(
        steps / stage.steps * flops_per_image(network, ratio, rows, scheme)
        for ratio, steps in ratio_steps(stage.mask_ratio, stage.steps).items()
    )


def _rows(plan: TrainingPlan, name: str) -> float:
    """Caption rows the network reads: stored mean where text is trimmed and known, else all."""
    if plan.config.data.text == "full" or name not in plan.data:
        return plan.text.length
    return _mean(plan, name, lambda s: s.text_bytes / s.captions) / _row_bytes(plan)


def _bytes(plan: TrainingPlan, name: str) -> float:
    """Bytes that one sample takes to read: its latent and its caption's rows."""
    if name not in plan.data:
        side = plan.latent_side(plan.config.stages[name])
        latent = FLOAT16 * plan.vae.channels * side * side
        return latent + plan.text.length * _row_bytes(plan)
    return _mean(plan, name, lambda s: s.latent_bytes / s.samples + s.text_bytes / s.captions)


def _row_bytes(plan: TrainingPlan) -> int:
    return row_bytes(plan.text.width, plan.config.data.text_dtype)


def _mean(plan: TrainingPlan, name: str, figure: Callable[[TrainingSource], float]) -> float:
    """Mean of a figure over the samples of an epoch."""
    pairs = zip(plan.shares(name), plan.data[name], strict=True)
    return sum(share * figure(source) for share, source in pairs)


def _hours(plan: TrainingPlan, flops: float) -> float:
    estimate = plan.config.estimate
    return flops / (estimate.peak_tflops * 1e12 * estimate.mfu) / 3600


def _data_line(plan: TrainingPlan) -> str:
    if not plan.data:
        trimmed = plan.config.data.text == "trimmed"
        longest = f" for the longest captions, {plan.text.length} rows" if trimmed else ""
        return (
            f"data: not all there under {plan.config.data.root}; bytes follow from the formats"
            f"{longest}"
        )
    sources = next(iter(plan.data.values()))
    counts = ", ".join(f"{s.name} {s.samples:,}" for s in sources)
    return f"data: {counts} samples of split {plan.config.data.split}; bytes are measured"

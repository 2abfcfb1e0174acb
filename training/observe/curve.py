"""A finished stage's curves: <stage>/loss.png, drawn from its journal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WINDOWS = 25  # in a stage; the mean is taken over one


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Training loss, its running mean, and the mean held-out losses, over steps. Draws nothing
    where no step has a loss.

    Args:
        rows: of a journal.
        path: the PNG; its folder exists.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = _series(rows, "train/loss")
    if not losses:
        return
    figure = Figure((8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="training, each step")
    window = max(1, len(losses) // WINDOWS)
    mean = np.convolve(losses, np.full(window, 1 / window), "valid")
    axes.plot(steps[window - 1 :], mean, color="C0", label=f"training, mean of {window} steps")
    names = {
        key for row in rows for key in row if key.startswith("eval/") and key.endswith("/mean")
    }
    shown = list(losses)
    for number, name in enumerate(sorted(names), 1):
        label = f"held out, {name.split('/')[1]} weights"
        steps, values = _series(rows, name)
        axes.plot(steps, values, color=f"C{number}", marker="o", markersize=3, label=label)
        shown += values
    # The first steps of a new network are far above all others.
    low, high = min(shown), float(np.quantile(shown, 0.98))
    axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low) + 1e-9)
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values where there is a number."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]

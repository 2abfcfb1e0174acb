"""Composer's loggers by name, and our own for Weights & Biases."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from composer import Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist

from pipeline.core.errors import SettingError
from training.settings import Config

# Composer's logger for MLflow knows no newer one.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow>=2.14.1,<3"}


def make_loggers(config: Config, path: Path) -> list[LoggerDestination]:
    """The loggers of one stage, whose folder is `path`.

    Raises:
        SettingError: the package behind one is not installed.
    """
    made: list[LoggerDestination] = []
    for name in config.logging.to:
        try:
            if name == "tensorboard":
                from composer.loggers import TensorboardLogger

                made.append(TensorboardLogger(log_dir=str(path / "tensorboard")))
            elif name == "wandb":
                made.append(WandB(config.name, path, config.model_dump(mode="json")))
            else:
                from composer.loggers import MLFlowLogger

                made.append(MLFlowLogger(experiment_name=config.name, run_name=path.name))
        except ImportError as error:
            raise SettingError(
                f"logging.to={name}: pip install '{PACKAGES[name]}' first"
            ) from error
    return made


class WandB(LoggerDestination):
    """Metrics and images to Weights & Biases, from the first rank.

    Composer's own stops with an AttributeError at versions since 0.19, which is 2024's.

    Args:
        project: the run's name.
        path: the stage's folder, which wandb's own files go to; its name is that of W&B's run.
        config: the run's settings.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, project: str, path: Path, config: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._project = project
        self._path = path
        self._config = config
        self._run: Any = None

    def init(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            self._run = self._wandb.init(
                project=self._project,
                name=self._path.name,
                dir=str(self._path),
                config=self._config,
            )

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def log_images(
        self,
        images: Any,
        name: str = "Images",
        channels_last: bool = False,
        step: int | None = None,
        masks: Any = None,
        mask_class_labels: Any = None,
        use_table: bool = True,
    ) -> None:
        """One image, or a sequence of them: uint8 (H, W, 3), or (3, H, W) without
        `channels_last`."""
        if self._run is not None:
            several = [images] if getattr(images, "ndim", 0) == 3 else list(images)
            arrays = [np.asarray(image) for image in several]
            if not channels_last:
                arrays = [array.transpose(1, 2, 0) for array in arrays]
            self._run.log({name: [self._wandb.Image(array) for array in arrays]}, step=step)

    def post_close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(sys.exc_info()[0] is not None))
            self._run = None

"""Whether the loggers of a run can be used: asked before anything is trained. No torch here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from unittest import mock

from pipeline.core.errors import SettingError
from training.config.settings import Config

PATIENCE_S = 10
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}


def check(config: Config) -> None:
    """Raises:
    SettingError: a logger's package is not installed, its server does not answer, or does not
        take the credentials.
    """
    checks: dict[str, Callable[[], None]] = {"wandb": _check_wandb, "mlflow": _check_mlflow}
    for name in config.logging.to:
        try:
            if name == "tensorboard":
                import tensorboard  # noqa: F401
            else:
                checks[name]()
        except ImportError as error:
            raise SettingError(
                f"logging.to={name}: pip install '{PACKAGES[name]}' first ({error})"
            ) from error


def _check_wandb() -> None:
    import wandb

    try:
        # Answers at once where W&B is offline or disabled; asks nobody at a terminal.
        mode = wandb.setup().settings.mode
        if mode == "online" and not wandb.login(prompt=False, verify=True):
            raise SettingError("no API key")
    except (wandb.Error, SettingError) as error:
        raise SettingError(
            f"logging.to=wandb: {_line(error)}; set WANDB_API_KEY, or WANDB_MODE=offline to write "
            "files for `wandb sync`"
        ) from error


def _check_mlflow() -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    # Of its own it tries for minutes.
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": PATIENCE_S, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 1}
    with mock.patch.dict(os.environ, {key: str(value) for key, value in limits.items()}):
        try:
            mlflow.MlflowClient().search_experiments(max_results=1)
        except (MlflowException, OSError) as error:
            raise SettingError(
                f"logging.to=mlflow: {_line(error)}; check MLFLOW_TRACKING_URI, and its credentials"
            ) from error


def _line(error: Exception) -> str:
    """Its message, without the user and password of an address."""
    return re.sub(r"://[^\s/@'\"]*@", "://", " ".join(str(error).split()))[:300]

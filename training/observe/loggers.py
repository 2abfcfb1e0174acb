"""Where figures and pictures go beside the run's own folder: TensorBoard, Weights & Biases, MLflow.

A stage is one run there, and one curve, however often it was started: <stage>/loggers.json says as
which run it is known, and steps that were logged before are not logged again. TensorBoard's files
say from which step on they replace what an earlier start wrote.

Composer's own loggers begin a new run at each start, read folders as templates, and want older
versions of the packages.
"""

from __future__ import annotations

import abc
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from composer import Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist

from pipeline.core.errors import SettingError
from pipeline.core.store import Store
from training.checkpoint import intact
from training.checkpoint.run_folder import StageFolder
from training.config.settings import Config
from training.observe import metrics_log

RECORD = "loggers.json"
_PARAMS = 100  # that MLflow takes at once


def make_loggers(config: Config, path: Path) -> list[LoggerDestination]:
    """The loggers of one stage, whose folder is `path`, on the first rank; none on others.

    They have to be made before the journal is cut, whose last step may have been logged.

    Raises:
        SettingError: the record of earlier starts is damaged.
    """
    if dist.get_global_rank() > 0 or not config.logging.to:
        return []
    record = read_record(path)
    rows = metrics_log.read(StageFolder(path).metrics)
    record["step"] = max([record.get("step", 0), *(row["step"] for row in rows[-1:])])
    kinds = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
    return [kinds[name](config, path, record) for name in config.logging.to]


def read_record(path: Path) -> dict[str, Any]:
    """Logger -> the id that a stage's run has there; under "step" the last step that was logged.

    Raises:
        SettingError: the record is damaged.
    """
    file, remedy = path / RECORD, "remove it, and loggers begin a new run"
    return intact.record(file.read_bytes(), file, dict, remedy) if file.exists() else {}


class Tracker(LoggerDestination):
    """What the loggers have in common.

    Args:
        path: the stage's folder; its name is that of the run.
        record: what `read_record` gave; a new run adds its id.
    """

    name: str

    def __init__(self, config: Config, path: Path, record: dict[str, Any]) -> None:
        self._config = config
        self._path = path
        self._record = record
        self._after = 0
        """Later steps are new."""

    def init(self, state: State, logger: Logger) -> None:
        known = self._record.get(self.name)
        self._after = self._record["step"] if known else 0
        try:
            self._record[self.name] = self.open(known, state)
        except Exception as error:  # each package has its own, and servers theirs
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise SettingError(
                f"logging.to={self.name}: {text}; mend it, or leave it out"
            ) from error
        Store(self._path).write_json(RECORD, self._record)

    @abc.abstractmethod
    def open(self, known: str | None, state: State) -> str:
        """Goes on with the run of that id, or begins one; returns its id. May set `_after`."""

    @abc.abstractmethod
    def send(self, metrics: dict[str, Any], step: int) -> None: ...

    @abc.abstractmethod
    def send_image(self, name: str, number: int, image: np.ndarray, step: int) -> None:
        """One of the images of that name: uint8 (H, W, 3)."""

    @abc.abstractmethod
    def finish(self, failed: bool) -> None: ...

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if step is not None and step > self._after:
            self.send(metrics, step)

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
        if step is None or step <= self._after:
            return
        several = [images] if getattr(images, "ndim", 0) == 3 else list(images)
        for number, image in enumerate(np.asarray(image) for image in several):
            shown = image if channels_last else image.transpose(1, 2, 0)
            self.send_image(name, number, shown, step)

    def post_close(self) -> None:
        self.finish(sys.exc_info()[0] is not None)


class TensorBoard(Tracker):
    """Event files under <stage>/tensorboard/<run>-<stage>."""

    name = "tensorboard"

    def open(self, known: str | None, state: State) -> str:
        self._writer: Any = None  # a SummaryWriter, once it is known where the stage goes on
        self._folder = self._path / "tensorboard" / state.run_name
        return state.run_name

    def after_load(self, state: State, logger: Logger) -> None:
        """Now it is known where the stage goes on."""
        from torch.utils.tensorboard import SummaryWriter

        self._after = state.timestamp.batch.value
        # Readers leave out what other files of the folder have from this step on.
        purge = self._after + 1 if any(self._folder.glob("events.*")) else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)

    def send(self, metrics: dict[str, Any], step: int) -> None:
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()  # what comes before a checkpoint has to outlive the process

    def send_image(self, name: str, number: int, image: np.ndarray, step: int) -> None:
        tag = f"{name}/{number}" if number else name
        self._writer.add_image(tag, image, step, dataformats="HWC")
        self._writer.flush()

    def finish(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB(Tracker):
    """Weights & Biases, whose own files go to <stage>/wandb."""

    name = "wandb"

    def open(self, known: str | None, state: State) -> str:
        import wandb

        self._wandb = wandb
        own = known or secrets.token_hex(8)
        self._run: Any = wandb.init(
            project=self._config.name,
            name=self._path.name,
            dir=str(self._path),
            config=self._config.model_dump(mode="json"),
            id=own,
            resume="allow",
        )
        if self._run.step:  # the server knows what it has
            self._after = self._run.step - 1
        return own

    def send(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def send_image(self, name: str, number: int, image: np.ndarray, step: int) -> None:
        key = f"{name}/{number}" if number else name
        self._run.log({key: self._wandb.Image(image)}, step=step)

    def finish(self, failed: bool) -> None:
        if getattr(self, "_run", None) is not None:
            self._run.finish(exit_code=int(failed))
            self._run = None


class MLflow(Tracker):
    """MLflow, at MLFLOW_TRACKING_URI; the experiment is the run's name, or MLFLOW_EXPERIMENT_ID."""

    name = "mlflow"

    def open(self, known: str | None, state: State) -> str:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient()
        # Its queues of metrics and images read a file store's files while the other writes them.
        self._local = not self._client.tracking_uri.startswith("http")
        try:
            if known:
                self._client.update_run(known, status="RUNNING")
                history = self._client.get_metric_history(known, "train/lr")
                self._after = max((metric.step for metric in history), default=0)
        except MlflowException:
            known = None  # of another tracking server, or deleted there
        self._id = known or self._begin()
        return self._id

    def _begin(self) -> str:
        from mlflow.entities import Param

        self._after = 0
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if not experiment:
            found = self._client.get_experiment_by_name(self._config.name)
            experiment = (
                found.experiment_id if found else self._client.create_experiment(self._config.name)
            )
        run = self._client.create_run(experiment, run_name=self._path.name).info.run_id
        settings = _flat(self._config.model_dump(mode="json"))
        params = [Param(key, str(value)[:500]) for key, value in settings.items()]
        for start in range(0, len(params), _PARAMS):
            self._client.log_batch(run, params=params[start : start + _PARAMS])
        return run

    def send(self, metrics: dict[str, Any], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        own = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._client.log_batch(self._id, metrics=own, synchronous=self._local)

    def send_image(self, name: str, number: int, image: np.ndarray, step: int) -> None:
        key = f"{name}/{number}" if number else name
        self._client.log_image(self._id, image, key=key, step=step, synchronous=self._local)

    def finish(self, failed: bool) -> None:
        if getattr(self, "_id", ""):
            import mlflow

            mlflow.flush_async_logging()
            self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")
            self._id = ""


def _flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found

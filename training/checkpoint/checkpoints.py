"""Composer checkpoints as data: read without executing a pickle, and handed from stage to stage."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from composer import State
from composer.utils import ObjectStore
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.torch_version import TorchVersion

from pipeline.core.errors import SettingError
from training.checkpoint.run_folder import StageFolder
from training.network.dit import MicroDiT
from training.weights.official import PREFIX
from training.weights.safe_load import load


def allow_only_data() -> None:
    """From here on torch.load runs no code of a file, also where Composer asks it to.

    Composer 0.32.1 hard-codes weights_only=False; the variable overrules that. The list names what
    its checkpoints hold beside tensors and plain values.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([datetime.timedelta, TorchVersion])


class Checkpoint(ObjectStore):
    """A local file as Composer's loader is given it, whatever its name.

    A path is read as a URL there (twice), then as a template: `#`, `?`, `:` and braces lose it.

    Args:
        path: the file, which becomes the one object of the store, under any name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()

    def get_object_size(self, object_name: str) -> int:
        return self._path.stat().st_size

    def download_object(
        self,
        object_name: str,
        filename: str | Path,
        overwrite: bool = False,
        callback: Callable[[int, int], None] | None = None,
    ) -> None:
        os.symlink(self._path, filename)


def template(path: Path) -> str:
    """What Composer's saver makes this very path of."""
    return str(path).replace("{", "{{").replace("}", "}}")


class Average(TypedDict):
    """One of the averages of the weights that `training.optim.ema.EMA` keeps."""

    updates: int
    """Since it began."""
    values: dict[str, Tensor]
    """By parameter name."""


@dataclass(frozen=True)
class CheckpointState:
    """The parts of a checkpoint that are read without Composer."""

    path: Path
    model: dict[str, Tensor]
    averages: dict[str, Average]  # by name
    optimizers: dict[str, Any]
    rollbacks: int  # of its stage up to it
    device_seconds: float  # that the run had taken

    def check(self, network: MicroDiT) -> None:
        """That the checkpoint is one of this very network.

        Composer loads with strict=False: what a file lacks would silently stay as it is.

        Raises:
            SettingError: names or shapes differ.
        """
        expected = {PREFIX + name: value.shape for name, value in network.state_dict().items()}
        found = {name: value.shape for name, value in self.model.items()}
        if expected != found:
            name = min(key for key in expected | found if expected.get(key) != found.get(key))
            raise SettingError(
                f"{self.path}: of another network ({name}: expected {expected.get(name)}, "
                f"found {found.get(name)})"
            )

    def restore_weights(self, network: MicroDiT) -> None:
        """Into a network that may have another resolution: positions stay its own.

        Raises:
            SettingError: weights of another architecture.
        """
        # Buffers follow from the config; positions change with the resolution.
        tensors = {name.removeprefix(PREFIX): value for name, value in self.model.items()}
        tensors |= dict(network.named_buffers())
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise SettingError(f"{self.path}: {' '.join(str(error).split())[:300]}") from error

    def require_weights(self, file: Path) -> None:
        """That the checkpoint is what its finished stage's weights were written from.

        Args:
            file: with the live weights.

        Raises:
            SettingError: other weights.
        """
        name = "no whole file"
        try:
            with safe_open(file, "pt") as weights:
                for key, value in self.model.items():
                    name = key.removeprefix(PREFIX)
                    if not torch.equal(weights.get_tensor(name), value):
                        break
                else:
                    return
        except SafetensorError:
            pass  # truncated, or without a tensor of this name
        raise SettingError(
            f"{self.path}: holds other weights than {file} ({name}); put the stage's own there, or "
            "remove its folder"
        )

    def restore_moments(self, state: State) -> None:
        """The optimizer's moments; the learning rate and other settings stay the new stage's.

        Raises:
            SettingError: moments of another optimizer.
        """
        optimizer = state.optimizers[0]
        own = type(optimizer).__qualname__
        if own not in self.optimizers:
            raise SettingError(
                f"keep_moments: {self.path} has moments of {', '.join(self.optimizers)}, which "
                f"{own} cannot go on with; set keep_moments=false, or keep the optimizer"
            )
        groups = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        set_optimizer_state_dict(
            state.model,
            optimizer,
            optim_state_dict=self.optimizers[own],
            options=StateDictOptions(full_state_dict=state.fsdp_enabled),
        )
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)


def read(path: Path) -> CheckpointState:
    """A checkpoint's weights, averages and optimizer state, on the CPU.

    Raises:
        SettingError: not there, truncated, holding more than data, or of another stage than that
            whose folder it is in.
    """
    try:
        state = load(path)["state"]
        averages = state["callbacks"]["EMA"]["averages"]
        _ = state["timestamp"], state["dataset_state"]  # Composer would do without
        run, stage = state["run_name"], path.parent.name
        if not all(isinstance(value, Tensor) for value in state["model"].values()):
            raise TypeError("its weights are no tensors")
        if not run.endswith(f"-{stage}"):
            raise SettingError(
                f"{path}: is of run {run}, not of stage {stage}; put the stage's own there, or "
                "remove it"
            )
        callbacks = state["callbacks"]
        own, expected = callbacks["SaveCheckpoints"].get("begun"), StageFolder(path.parent).begun()
        if own and expected and own != expected:
            raise SettingError(
                f"{path}: is of a stage that was begun with other settings or weights than "
                f"{path.parent / 'settings.json'} says; put this stage's own there, or remove it"
            )
        return CheckpointState(
            path,
            state["model"],
            averages,
            state["optimizers"],
            callbacks["Guard"]["rollbacks"],
            callbacks["Metrics"]["device_seconds"],
        )
    except FileNotFoundError as error:
        raise SettingError(
            f"{path}: the last checkpoint of a finished stage is missing, so the next stage cannot "
            "begin; remove the finished stage's folder to run it again"
        ) from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        text = " ".join(str(error).split())[:120]
        raise SettingError(f"{path}: no checkpoint of this trainer ({text})") from error

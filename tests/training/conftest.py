"""One thread a process: small tensors gain nothing from two, and lose much on a busy machine.
SIGTERM stays pytest's. And the smallest encoders, with settings of a run over them."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.helpers.groups import Encoders, make_encoders, settings

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_sigterm() -> Iterator[None]:
    """A run that got it in this process would ignore it for good, as it was about to end."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return make_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture
def raw(tmp_path: Path, encoders: Encoders) -> dict[str, Any]:
    """Settings of a run whose shards and folder are in `tmp_path`; no shard is there yet."""
    return settings(tmp_path / "data", encoders, tmp_path / "run")

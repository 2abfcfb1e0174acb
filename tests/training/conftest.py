"""One thread a process: small tensors gain nothing from two, and lose much on a busy machine. And
SIGTERM stays pytest's."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

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

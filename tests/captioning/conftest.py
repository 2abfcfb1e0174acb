from __future__ import annotations

from pathlib import Path

import pytest

from tests.captioning.helpers.small_llava import save_llava
from tests.captioning.helpers.small_qwen import save_qwen


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    """A folder with a small random LLaVA 1.5."""
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def llava_next(tmp_path_factory) -> Path:
    """A folder with a small random LLaVA 1.6, whose prompts differ in length with the picture."""
    return save_llava(tmp_path_factory.mktemp("llava_next"), "llava_next")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Path:
    """A folder with a small random Qwen2-VL."""
    return save_qwen(tmp_path_factory.mktemp("qwen"))

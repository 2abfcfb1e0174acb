from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.store import Store
from pipeline.stages.caption import CaptionStage
from pipeline.stages.download import Download
from tests.captioning.helpers.small_llava import save_llava
from tests.pipeline.helpers.roots import SETTINGS, run_here


@pytest.fixture
def downloaded(tmp_path) -> Store:
    """A root with one training and one held-out shard, downloaded and captioned."""
    store = Store(tmp_path / "root")
    run_here(Download("openmoji", SETTINGS), store)
    run_here(CaptionStage("openmoji", "colour"), store)
    return store


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    """A folder with a small random LLaVA 1.5."""
    return save_llava(tmp_path_factory.mktemp("llava"))

from __future__ import annotations

import pytest

from pipeline.core.store import Store
from pipeline.stages.caption import CaptionStage
from pipeline.stages.download import Download
from tests.pipeline.roots import SETTINGS, run_here


@pytest.fixture
def downloaded(tmp_path) -> Store:
    """A root with one training and one held-out shard, downloaded and captioned."""
    store = Store(tmp_path / "root")
    run_here(Download("openmoji", SETTINGS), store)
    run_here(CaptionStage("openmoji", "colour"), store)
    return store

"""A process that dies at every single write, and a rerun: the same tree, file by file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core import store as store_module
from pipeline.core.stage import Stage
from pipeline.core.store import Store
from pipeline.engine.plan import Choice
from pipeline.stages.caption import CaptionStage
from pipeline.stages.download import Download
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings
from tests.pipeline.helpers.roots import SETTINGS, remove_leftovers, run_here, tree

CAPTION = CaptionStage("openmoji", "colour")
DOWNLOAD = Download("openmoji", SETTINGS)
LARGER = Download("openmoji", SETTINGS.model_copy(update={"size": 72}))


def encode() -> Encode:
    settings = EncodeSettings("tiny4", "tiny-clip", (64,), "alt:0.5,colour:0.5", "trimmed")
    return Encode("openmoji", settings)


@pytest.mark.parametrize("moment", ["before", "torn", "after"])
@pytest.mark.parametrize("name", ["download", "redo", "caption", "encode"])
def test_a_crash_at_any_write_and_a_rerun_give_the_same_tree(tmp_path, downloaded, name, moment):
    stage: Stage = {
        "download": DOWNLOAD,
        "redo": LARGER,  # over an earlier generation, whose files stay
        "caption": CAPTION,
        "encode": encode(),
    }[name]
    choice = Choice(stale=name == "redo")
    begin = tmp_path / "begin"
    shutil.copytree(downloaded.root, begin)
    for output in stage.groups() if name != "redo" else []:
        shutil.rmtree(begin / output, ignore_errors=True)
    whole = tmp_path / "whole"
    shutil.copytree(begin, whole)
    writes = _counted(lambda: run_here(stage, Store(whole), choice))
    expected = tree(whole)
    assert writes >= 4
    for number in range(writes):
        root = tmp_path / f"{number}"
        shutil.copytree(begin, root)
        _die_at(number, moment, lambda root=root: run_here(stage, Store(root), choice))
        for group in stage.groups():
            remove_leftovers(Store(root), group)
        run_here(stage, Store(root), choice)
        assert tree(root) == expected, f"write {number}"
        shutil.rmtree(root)


def _counted(run: Callable[[], object]) -> int:
    count = 0
    replace = os.replace

    def counting(*paths) -> None:
        nonlocal count
        count += 1
        replace(*paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module.os, "replace", counting)
        run()
    return count


def _die_at(number: int, moment: str, run: Callable[[], object]) -> None:
    """Runs in a child that dies at this write: before it, with half of it in place under its
    temporary name, or right after the file appeared."""
    child = os.fork()
    if child == 0:
        count = 0
        replace = os.replace

        def dying(source, target) -> None:
            nonlocal count
            if count == number:
                if moment == "before":
                    Path(source).unlink()
                if moment == "torn":
                    os.truncate(source, Path(source).stat().st_size // 2)
                if moment == "after":
                    replace(source, target)
                os._exit(9)
            count += 1
            replace(source, target)

        store_module.os.replace = dying
        try:
            run()
        finally:
            os._exit(1)  # it did not die where it was told to
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9

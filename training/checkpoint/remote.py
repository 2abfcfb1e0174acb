"""A run's checkpoints on an object store: copied there behind the training, fetched from there by a
start whose own folder has less.

What lies under `checkpoint.remote` is what lies in the run's folder: of each stage its records
(`settings.json` and the like), its checkpoints, then its weights, `model.safetensors` last. One
PUT, or completed multipart upload, makes a file appear whole.
"""

from __future__ import annotations

import sys
import threading
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import cast

from pipeline.core import uploads
from pipeline.core.errors import SettingError, StorageError
from pipeline.core.store import Store
from training.checkpoint import intact, run_folder
from training.checkpoint.run_folder import MODEL, StageFolder
from training.config.plan import TrainingPlan

RETRY_S = 30.0  # after the Store's own retries have failed
LAST_TRIES = 3  # of each file, when the run has ended
_CHECKPOINTS = "step-*.pt"
_RECORDS = ("*.json", "*.jsonl")  # small files that a stage goes on writing
_WEIGHTS = "*.safetensors"


class RemoteCopy:
    """Copies files of a run's folder, in the order in which they are given, in a thread of its own.

    A checkpoint that a later one replaced before its turn came is left out. Used as a context: its
    end waits until everything is there.

    Args:
        folder: the run's folder.
        url: where the copies go; "" copies nothing.
        keep: checkpoints of a stage that stay there.

    Raises:
        StorageError: at the end, if a file could not be copied.
    """

    def __init__(self, folder: Path, url: str, keep: int) -> None:
        self._folder = folder
        self._store = open_copy(url) if url else None
        self._keep = keep
        self._pending: list[Path] = []
        self._changed = threading.Condition()
        self._ending = False
        self._lost: list[str] = []
        self.failures = 0
        """Attempts that failed, whether or not a later one succeeded."""
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> RemoteCopy:
        if self._store is not None:
            for upload in uploads.unfinished(self._store, ""):  # of a start that was killed
                uploads.abort(self._store, upload)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._store is None:
            return
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()
        if self._lost:
            message = (
                f"{len(self._lost)} files of {self._folder} are not on {self._store.root} "
                f"({self.failures} attempts failed; first: {self._lost[0]}); the same command "
                "copies them"
            )
            if error is None:
                raise StorageError(message)
            _say(message)  # the run has ended for another reason, which is told

    def put(self, path: Path) -> None:
        """Copies a file of the run's folder, later; returns at once."""
        if self._store is not None:
            with self._changed:
                if path not in self._pending[1:]:  # the first may be under way, as it was
                    self._pending.append(path)
                self._changed.notify()

    def put_records(self, stage: StageFolder) -> None:
        """Copies the stage's small files, as they are when their turn comes."""
        for pattern in _RECORDS:
            for path in sorted(stage.path.glob(pattern)):
                self.put(path)

    def put_checkpoint(self, path: Path) -> None:
        """Copies a checkpoint, behind the records that belong to it."""
        self.put_records(StageFolder(path.parent))
        self.put(path)

    def put_weights(self, stage: StageFolder) -> None:
        """Copies a finished stage's weights; those that mark it as finished come last."""
        self.put_records(stage)
        for path in sorted(stage.path.glob(_WEIGHTS), key=lambda path: path == stage.model):
            self.put(path)

    def catch_up(self, stage: StageFolder) -> None:
        """Copies what an earlier start of the run left to do.

        Raises:
            StorageError: the store cannot be read.
        """
        if self._store is None:
            return
        there = self._store.names(stage.path.name)
        for path in stage.checkpoints()[-1:]:
            if path.name not in there:
                self.put_checkpoint(path)
        if any(path.name not in there for path in stage.path.glob(_WEIGHTS)):
            self.put_weights(stage)

    def _run(self) -> None:
        tries = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._ending)
                if not self._pending:
                    return
                path = self._pending[0]
            failed = "" if self._is_replaced(path) else self._copy(path)
            tries = tries + 1 if failed else 0
            with self._changed:
                if failed and not (self._ending and tries >= LAST_TRIES):
                    # What comes behind has to wait: order is what makes the copy whole.
                    self._changed.wait_for(lambda: self._ending, RETRY_S)
                    continue
                if failed:
                    # The rest is of no use without it.
                    left = {other for other in self._pending if other.exists()} - {path}
                    self._lost = [failed, *map(str, left)]
                    return
                self._pending.pop(0)

    def _is_replaced(self, path: Path) -> bool:
        if not path.match(_CHECKPOINTS):
            return False
        with self._changed:
            later = [p for p in self._pending[1:] if p.parent == path.parent]
        return not path.exists() or any(p.match(_CHECKPOINTS) for p in later)

    def _copy(self, path: Path) -> str:
        """Why it failed; "" where it did not."""
        store = cast(Store, self._store)  # else there is no thread
        try:
            store.upload(path, path.relative_to(self._folder).as_posix())
            if path.match(_CHECKPOINTS):
                self._prune(store, path.parent.name)
        except StorageError as error:
            if not path.exists():
                return ""  # replaced while its turn came
            self.failures += 1
            _say(f"{error} (attempt {self.failures} that failed; training goes on)")
            return str(error)
        return ""

    def _prune(self, store: Store, stage: str) -> None:
        for name in _matching(store.names(stage), _CHECKPOINTS)[: -self._keep]:
            store.delete(f"{stage}/{name}")


def fetch(plan: TrainingPlan) -> bool:
    """Brings the run's folder to where its copy is, if that is further; whether it was.

    Raises:
        StorageError: the store cannot be read.
        SettingError: the copy is of a run with other settings, or damaged.
    """
    url = plan.config.checkpoint.remote
    if not url:
        return False
    store, stages = open_copy(url), list(plan.config.stages)
    names = {name: store.names(name) for name in stages}
    if _position(names) <= _position({name: _whole(plan, name) for name in stages}):
        return False
    paths = {n: f"{n}/{run_folder.SETTINGS}" for n in stages if run_folder.SETTINGS in names[n]}
    records = {
        name: run_folder.settings_record(store.read(path), store.url(path))
        for name, path in paths.items()
    }
    for name, path in paths.items():
        changes = run_folder.changes(plan, name, records[name], records)
        if changes:  # before anything of this run is replaced
            raise SettingError(
                f"checkpoint.remote={url}: {path} there is of other settings "
                f"({'; '.join(changes[:5])}); choose another place for this run's copies"
            )
    for name in stages:
        for record in _matching(names[name], *_RECORDS):
            _download(store, plan, f"{name}/{record}", again=True)
    for name, after in zip(stages, [*stages[1:], None], strict=True):
        path = run_folder.stage_folder(plan, name)
        saved = _matching(names[name], _CHECKPOINTS)[-1:]
        # What this stage goes on from, or the next one begins with.
        if after is None or not _matching(names[after], _CHECKPOINTS, MODEL):
            for checkpoint in saved:
                _download(store, plan, f"{name}/{checkpoint}")
        for model in sorted(_matching(names[name], _WEIGHTS), key=lambda model: model == MODEL):
            _download(store, plan, f"{name}/{model}")
        if path.finished():
            run_folder.link(path.model, plan.config.run_folder() / MODEL)
    return True


def open_copy(url: str) -> Store:
    """The place of a run's copies.

    Raises:
        SettingError: no URL that can be read.
    """
    try:
        return Store(url)
    except SettingError as error:  # which speaks of a data root
        raise SettingError(str(error).replace("--root ", "checkpoint.remote=", 1)) from error


def _position(names: dict[str, list[str]]) -> list[tuple[bool, str]]:
    """How far a copy of the run is, by the files of each stage: whether it is finished, and its
    last step."""
    found = []
    for own in names.values():
        finished = MODEL in own
        step = "" if finished else max(_matching(own, _CHECKPOINTS), default="")
        found.append((finished, step))
    return found


def _whole(plan: TrainingPlan, name: str) -> list[str]:
    """A stage's files in the run's folder that tell how far it is, without damaged ones."""
    stage = run_folder.stage_folder(plan, name)
    if stage.finished():
        return [MODEL]
    return [path.name for path in stage.checkpoints()[-1:] if not _fault(path)]


def _fault(path: Path) -> str:
    if path.match(_CHECKPOINTS):
        return intact.checkpoint_fault(path)
    return intact.weights_fault(path) if path.match(_WEIGHTS) else ""


def _matching(names: list[str], *patterns: str) -> list[str]:
    """Those of these names, in order."""
    return [name for name in sorted(names) if any(fnmatch(name, own) for own in patterns)]


def _download(store: Store, plan: TrainingPlan, path: str, again: bool = False) -> None:
    target = plan.config.run_folder() / path
    if not again and target.exists() and not _fault(target):
        return
    _say(f"fetching {store.url(path)}")
    store.download(path, target)
    if fault := _fault(target):
        target.unlink()
        raise SettingError(
            f"checkpoint.remote: {store.url(path)}: {fault}; remove it there, and the run goes on "
            "from what is left"
        )


def _say(text: str) -> None:
    print(f"checkpoint.remote: {text}", file=sys.stderr, flush=True)

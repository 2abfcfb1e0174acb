"""A large file on its way to this machine's disk: resumed, checked, renamed when it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from pipeline.core.disk import second_name
from pipeline.core.links import last_part, public
from pipeline.core.store import size as readable
from pipeline.sources.files.scratch_files import record_of, require_space

ATTEMPTS = 8  # in a row that bring no new byte
BACKOFF_S = 1.0  # before the second attempt; doubles, up to LONGEST_S
LONGEST_S = 60.0

#: What transfers did in this process since somebody last took it: bytes, files, resumptions.
COUNTERS: Counter[str] = Counter()


class TransferError(RuntimeError):
    """A file that cannot be had, now or ever; it concerns the shards that need it.

    Never chained to the error it comes from: those of HTTP clients name whole URLs, signature and
    all, and Ray prints the chain.
    """


class Interrupted(Exception):
    """It may go better on the next attempt, where this one stopped."""

    def __init__(self, why: str, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.after_s = after_s  # upstream asks not to be asked before


class Changed(Exception):
    """What came so far is not part of what upstream has now: from the start again."""


@dataclass(frozen=True)
class Facts:
    """What upstream says of a file. Unknown parts are empty."""

    size: int | None = None  # bytes
    version: str = ""  # an ETag, or whatever changes with the content
    checksum: str = ""  # "sha256:…" or "md5:…", in hex


def take_counters() -> Counter[str]:
    """What transfers did since the last call, for a worker's own counters."""
    taken = Counter(COUNTERS)
    COUNTERS.clear()
    return taken


class Transfer:
    """One file's way to the scratch folder, by whoever holds its lock.

    Args:
        attempt: appends to `begin(…)` what is missing; see `Interrupted` and `Changed`.
    """

    def __init__(self, url: str, target: Path, checksum: str, attempt: Attempt) -> None:
        self.url, self.target, self.checksum, self.attempt = url, target, checksum, attempt
        self.part = target.with_name(target.name + ".part")
        self.record = record_of(target)
        self.facts = self._recorded()

    def run(self) -> None:
        if self.target.exists() and self.facts is not None:
            # Whole already, and upstream is asked whether still so. A second name of the file, for
            # others may be reading it under its first one.
            self.part.unlink(missing_ok=True)
            second_name(self.target, self.part)
        failed, mismatches = 0, 0
        # Bytes that were here at once: where there are no ranges, they go again.
        most = self._have()
        while True:
            try:
                self.attempt(self)
                self._check()
                break
            except Interrupted as error:
                failed = 1 if self._have() > most else failed + 1
                most = max(most, self._have())
                if failed > ATTEMPTS:
                    raise TransferError(
                        f"{public(self.url)}: {error}; given up after {failed} attempts with "
                        f"{readable(self._have())} here; a rerun goes on from there"
                    ) from None
                COUNTERS["transfers interrupted"] += 1
                pause = BACKOFF_S * 2 ** (failed - 1) * random.uniform(0.5, 1.0)
                time.sleep(min(max(pause, error.after_s), LONGEST_S))
            except Changed as error:
                self._forget()
                COUNTERS["transfers begun anew"] += 1
                most = 0
                mismatches += 1
                if mismatches > 2:
                    raise TransferError(f"{public(self.url)}: {error}, three times") from None
        with open(self.part, "rb") as file:
            os.fsync(file.fileno())
        if self.target.exists() and self.target.samefile(self.part):
            self.part.unlink()  # renaming a file to itself does nothing
            return
        os.replace(self.part, self.target)
        COUNTERS["files transferred"] += 1

    def begin(self, facts: Facts, offset: int) -> IO[bytes]:
        """The file to append to, where `offset` bytes are there, 0 or all that are.

        Called once upstream has said what it has, before the first byte.
        """
        if offset == 0:
            if self.checksum:
                facts = replace(facts, checksum=self.checksum)
            self._forget()
            temporary = self.record.with_name(self.record.name + ".new")
            temporary.write_text(json.dumps(asdict(facts)))
            os.replace(temporary, self.record)
            self.facts = facts
        else:
            COUNTERS["transfers resumed"] += 1
        if facts.size is not None:
            require_space(self.target.parent, facts.size - offset, last_part(self.url))
        return open(self.part, "ab")

    def resumable(self) -> tuple[int, Facts]:
        """How many bytes are there, and of what; 0 where that is not known well enough."""
        have = self._have()
        if self.facts is None or self.facts.size is None or have > self.facts.size:
            return 0, Facts()
        return have, self.facts

    def _check(self) -> None:
        """The length and the checksum of what came.

        Raises:
            Interrupted: it is too short. Changed: it is not what upstream said.
        """
        if self.facts is None:
            raise Interrupted("nothing came")
        have, expected = self._have(), self.facts.size
        if expected is not None and have < expected:
            raise Interrupted(f"{have} of {expected} bytes came")
        if expected is not None and have > expected:
            raise Changed(f"{have} bytes came, {expected} were announced")
        algorithm, _, wanted = self.facts.checksum.partition(":")
        if wanted:
            with open(self.part, "rb") as file:
                found = hashlib.file_digest(file, algorithm).hexdigest()
            if found != wanted:
                raise Changed(f"{algorithm} is {found}, upstream says {wanted}")

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)
        self.facts = None

    def _recorded(self) -> Facts | None:
        try:
            return Facts(**json.loads(self.record.read_text()))
        except (OSError, ValueError, TypeError):
            return None


Attempt = Callable[[Transfer], None]

"""Where a training opens shards: in the root itself, or in a cache of what was fetched or unpacked.

Each file is checked when a process opens it for the first time: its size against the index and its
commit record, its header against the index, and, where asked for, its hash. So damage is an error
that names the file, before its bytes are looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.commits import broken, reason
from pipeline.core.errors import BrokenShard, StorageError
from pipeline.core.mds import require_header, stored
from pipeline.core.published import Commits, Row, read_whole, require_bytes, unpacked
from pipeline.core.store import Store, fingerprint, sha256
from pipeline.core.tables import read_rows
from training.data.cache import Cache
from training.data.mapped import Maps, map_file

ATTEMPTS = 3  # to fetch a file
WAIT_S = 1.0  # before another one, growing


class ShardFiles:
    """The files of a published group.

    Args:
        rows: of the group's index, those that are read.
        hashes: whether files in the root are hashed when they are opened first; what is fetched is
            hashed in any case, once.
    """

    def __init__(
        self, store: Store, group: str, rows: list[Row], cache: Cache, hashes: bool = False
    ) -> None:
        self.group = group
        self.cached = not store.local or any(entry["compression"] for entry, _ in rows)
        self.cache = cache
        self.root = store.root
        self._rows = {record["shard"]: (entry, record) for entry, record in rows}
        self._hashes = hashes
        self._commits = Commits(store, group)
        if self.cached:
            self._commits.read_all()  # names in the cache hold what the commits say
            cache.remove_leftovers(group)
        self._paths: dict[str, str] = {}  # of shards that were checked
        self._connected = (os.getpid(), store)

    def shards(self) -> list[str]:
        """In the order of the index."""
        return [*self._rows]

    def largest(self) -> int:
        """Bytes of the largest shard, unpacked."""
        return max((entry["raw_data"]["bytes"] for entry, _ in self._rows.values()), default=0)

    def damaged(self, shard: str, error: Exception) -> BrokenShard:
        """The error of a shard whose samples are not what its header says."""
        where = f"{self.group}/{self.entry(shard)['raw_data']['basename']}"
        return broken(self._store, where, f"is damaged: {reason(error)}")

    def entry(self, shard: str) -> dict[str, Any]:
        """What the index says of a shard."""
        return self._rows[shard][0]

    def path(self, shard: str) -> str:
        """The shard's own bytes, where they are mapped from."""
        entry = self.entry(shard)
        if not self.cached:
            return self._store.url(f"{self.group}/{entry['raw_data']['basename']}")
        content = self._content(shard, stored(entry)["basename"])
        return str(self.cache.path(self.group, entry["raw_data"]["basename"], content))

    def map(self, shard: str) -> memoryview:
        """The shard's own bytes.

        Raises:
            BrokenShard: it is gone, or not what was committed.
            StorageError: it cannot be read, or fetched.
        """
        path = self._paths.get(shard)
        data = None if path is None else _maps.get(path)
        return self._open(shard, path or self.path(shard)) if data is None else data

    def key_rows(self, shard: str) -> tuple[np.ndarray, np.ndarray]:
        """Keys as bytes, in order, and the row of each in the MDS shard; raises as `map`."""
        try:
            found, rows = read_rows(self._keys(shard))
        except ValueError as error:
            where = f"{self.group}/{self._rows[shard][1]['keys']}"
            raise broken(self._store, where, f"is damaged: {reason(error)}") from error
        keys = np.array([key.encode() for key in found], dtype=np.bytes_)
        order = keys.argsort()
        return keys[order], rows[order]

    def _keys(self, shard: str) -> bytes:
        name = self._rows[shard][1]["keys"]
        if not self.cached:
            return read_whole(self._store, self.group, self._commits, shard, name)
        content = self._content(shard, name)
        path = self.cache.path(self.group, name, content)
        facts = self._commits.facts(shard, name)
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError):
                data = path.read_bytes()
                self.cache.used(path)
                if facts is None or sha256(data) == facts["sha256"]:
                    return data
                path.unlink(missing_ok=True)  # cut off, or overwritten
            self._fetch(shard, name, path)
        raise broken(self._store, f"{self.group}/{name}", f"cannot be kept in {path}")

    def prefetch(self, shard: str) -> None:
        """Fetches what will soon be opened. An error is that of opening it."""
        if self.cached:
            with contextlib.suppress(BrokenShard, StorageError, OSError):
                path = Path(self.path(shard))
                if not path.exists():
                    self._fetch(shard, stored(self.entry(shard))["basename"], path, attempts=1)

    @property
    def _store(self) -> Store:
        """Clients of object stores do not outlive a fork."""
        process, store = self._connected
        if process != os.getpid():
            store = Store(self.root)
            self._connected = os.getpid(), store
        return store

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connected": (0, None)}

    def _open(self, shard: str, path: str) -> memoryview:
        for last in (False, True):
            if self.cached:
                if not os.path.exists(path):
                    self._fetch(shard, stored(self.entry(shard))["basename"], Path(path))
                self.cache.used(Path(path))
                if self.cache.limit:
                    _maps.forget_deleted()
            try:
                data = self._map(shard, path)
            except BrokenShard:
                if last or not self.cached:
                    raise
                Path(path).unlink(missing_ok=True)  # cut off, or overwritten: fetched anew
            else:
                _maps.add(path, data)
                self._paths[shard] = path
                return data
        raise AssertionError

    def _map(self, shard: str, path: str) -> memoryview:
        entry = self.entry(shard)
        name = entry["raw_data"]["basename"]
        where = f"{self.group}/{name}"
        try:
            size = os.stat(path).st_size
            require_bytes(self._store, where, size, entry["raw_data"]["bytes"], "the index")
            data = map_file(path, size)
        except FileNotFoundError:
            raise broken(self._store, where, "is missing") from None
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
        if shard not in self._paths:
            self._check(shard, where, data)
        return data

    def _check(self, shard: str, where: str, data: memoryview) -> None:
        entry = self.entry(shard)
        facts = self._commits.facts(shard, entry["raw_data"]["basename"])
        if facts is not None:  # of the very file: neither packed, nor of another generation
            require_bytes(self._store, where, len(data), facts["bytes"], "its commit record")
            if self._hashes and hashlib.sha256(data).hexdigest() != facts["sha256"]:
                raise broken(self._store, where, "differs from its commit record (sha256)")
        try:
            require_header(data, entry)
        except ValueError as error:
            raise broken(self._store, where, f"is damaged: {reason(error)}") from error

    def _content(self, shard: str, name: str) -> str:
        """A hash of a file's content; where no commit knows it, of what the index says of it."""
        facts = self._commits.facts(shard, name)
        return facts["sha256"] if facts else fingerprint([self.root, self._rows[shard]])

    def _fetch(self, shard: str, name: str, target: Path, attempts: int = ATTEMPTS) -> None:
        """Puts a file into the cache, unpacked."""
        entry, where = self.entry(shard), f"{self.group}/{name}"
        facts = self._commits.facts(shard, name)
        packed = entry["compression"] is not None and name == stored(entry)["basename"]

        def unpack_to(part: Path) -> None:
            data = read_whole(self._store, self.group, self._commits, shard, name)
            Store(part.parent).write(part.name, unpacked(self._store, where, data, entry))

        def download_to(part: Path) -> None:
            try:
                self._store.download(where, part)
            except FileNotFoundError:
                raise broken(self._store, where, "is missing") from None
            if facts is None:
                return
            found = part.stat().st_size
            require_bytes(self._store, where, found, facts["bytes"], "its commit record")
            with open(part, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    raise broken(self._store, where, "differs from its commit record (sha256)")

        size = entry["raw_data"]["bytes"]
        if name != stored(entry)["basename"]:
            size = facts["bytes"] if facts else 0
        for attempt in range(1, attempts + 1):
            try:
                with Store(self.cache.folder).explained("", "write"):
                    self.cache.fill(target, size, unpack_to if packed else download_to)
                return
            except (BrokenShard, StorageError):
                if attempt == attempts or self._store.local:
                    raise
                time.sleep(WAIT_S * attempt)


_maps = Maps()

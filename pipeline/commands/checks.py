"""What `pipeline verify` asks of one committed shard of one group: its files, and what is in them.

A check reads the shard's files once, whole, and holds nothing else. It knows nothing of other
shards; what spans them is in `pipeline.commands.verify`.
"""

from __future__ import annotations

import errno
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core import facts, layout
from pipeline.core.commits import Commit, keys_hash, read_commit, read_file
from pipeline.core.errors import BrokenShard, SettingError, StorageError
from pipeline.core.groups import index_input
from pipeline.core.manifest import LatentsManifest, Manifest, OfficialManifest, TextManifest
from pipeline.core.mds import decode_shard, stored, unpack
from pipeline.core.store import Store, canonical_json, fingerprint, sha256
from pipeline.core.tables import from_parquet
from pipeline.core.tars import read_samples
from pipeline.core.tokens import BLOCK
from pipeline.official import layout as official
from pipeline.stages.images import IMAGE_EXTENSIONS

SHOWN = 20  # problems of a shard that are named one by one


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was committed, or does not fit what it belongs to."""

    source: str
    group: str  # below the source, e.g. latents/sdxl/256
    shard: str  # "": of the group's index.json or manifest.json
    sample: str | None  # its key, or None: of the whole shard
    what: str

    def __str__(self) -> str:
        where = "/".join(part for part in (self.source, self.group, self.shard) if part)
        sample = "" if self.sample is None else f"sample {self.sample}: "
        return f"{where}: {sample}{self.what}"


@dataclass(frozen=True)
class Task:
    """One shard of one group to check."""

    root: str
    source: str
    group: str  # below the source
    shard: str
    manifest: Manifest | None  # of an MDS group, where it can be read
    dropped: frozenset[str]  # keys that may be missing


@dataclass
class Checked:
    """What a check found. `split` is None where the commit record cannot be read."""

    shard: str
    problems: list[Problem] = field(default_factory=list)
    split: str | None = None
    samples: int = 0
    bytes: int = 0
    facts: str = ""  # of pipeline.core.facts
    index: bytes | None = None  # the shard's entries of index.json, as JSON
    inputs: bytes | None = None
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # of its keys


def check(task: Task) -> Checked:
    """Reads one committed shard and compares all that it says of itself.

    Raises:
        StorageError: the root cannot be read, so nothing can be said of its shards.
        SettingError: the commit was written by a newer version of this package.
    """
    shard = _Shard(task)
    shard.run()
    if shard.unnamed:
        more = f"and {shard.unnamed} more problems"
        shard.found.problems.append(Problem(task.source, task.group, task.shard, None, more))
    return shard.found


def digests(keys: list[str]) -> np.ndarray:
    """64 bits of each key, so that those of a whole source fit in memory."""
    joined = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(joined, np.uint64)


def keys_of(store: Store, group: str, commit: Commit) -> list[str]:
    """The keys of a committed shard, from the parquet that every group has."""
    table = from_parquet(read_file(store, group, commit, ".parquet"))
    if "status" in table.column_names:
        return [r["key"] for r in table.to_pylist() if r["status"] == "success"]
    return list(dict.fromkeys(table["key"].to_pylist()))  # a picture may have several captions


class _Shard:
    def __init__(self, task: Task) -> None:
        self.task = task
        self.group = f"{task.source}/{task.group}"
        self.store = Store(task.root)
        self.found = Checked(task.shard)
        self.unnamed = 0  # problems beyond those shown

    def problem(self, what: str, sample: str | None = None) -> None:
        if len(self.found.problems) >= SHOWN:
            self.unnamed += 1
            return
        task = self.task
        self.found.problems.append(Problem(task.source, task.group, task.shard, sample, what))

    def run(self) -> None:
        commit = self._commit()
        if commit is None:
            return
        self.found.split, self.found.samples = commit.split, commit.samples
        files = {name: self._file(commit, name) for name in commit.files}
        if self.found.problems:
            return
        rejects = [name for name in files if name.startswith("rejects/")]
        kind = self.task.group.split("/")[0]
        checks = {"images": self._images, "captions": self._captions}
        try:
            rejected = self._rejects(commit, files[rejects[0]] if rejects else None)
            checks.get(kind, self._mds)(commit, files, rejected)
        except (SettingError, StorageError):
            raise
        except Exception as error:
            # What tarfile, pyarrow and json raise on bytes that are not theirs has no common base.
            self.problem(f"cannot be read: {type(error).__name__}: {error}")

    def _commit(self) -> Commit | None:
        try:
            commit = read_commit(self.store, self.group, self.task.shard)
        except (SettingError, StorageError):
            raise
        except Exception as error:
            self.problem(f"its commit record is broken: {type(error).__name__}: {error}")
            return None
        if commit is None:  # gone since the listing: another run redoes it
            return None
        try:
            if commit.shard != self.task.shard:
                self.problem(f"its commit record is that of shard {commit.shard}")
            elif commit.fingerprint != fingerprint(commit.inputs):
                self.problem("its commit's fingerprint is not that of its inputs")
            self.found.facts = facts.of(self.group, commit.inputs)
            if facts.indexed(self.group) and not self.found.facts:
                self.problem("its commit does not say what made it")
            if commit.index is not None:
                self.found.index = canonical_json(commit.index)
                self.found.inputs = canonical_json(index_input(commit))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            self.problem(f"its commit record is broken: {type(error).__name__}: {error}")
        return None if self.found.problems else commit

    def _file(self, commit: Commit, name: str) -> bytes:
        """A file's bytes; a problem, and nothing, where they are not those that were committed."""
        try:
            data = self.store.read(f"{self.group}/{name}")
        except FileNotFoundError:
            self.problem(f"{name} is missing")
            return b""
        except StorageError as error:
            # A bad block is the file's own; anything else concerns the whole root.
            if getattr(error.__cause__, "errno", None) != errno.EIO:
                raise
            self.problem(f"{name} cannot be read: {error}")
            return b""
        self.found.bytes += len(data)
        expected = commit.files[name]
        if len(data) != expected["bytes"]:
            self.problem(f"{name} has {len(data)} bytes, its commit says {expected['bytes']}")
        elif sha256(data) != expected["sha256"]:
            self.problem(f"{name} has other bytes than its commit says (sha256 differs)")
        return data

    def _rejects(self, commit: Commit, data: bytes | None) -> set[str]:
        """The rejected keys."""
        rows = [] if data is None else from_parquet(data).to_pylist()
        reasons = Counter(row["reason"] for row in rows)
        if reasons != Counter(commit.rejects):
            self.problem(f"{_counts(reasons)} rejects, its commit says {_counts(commit.rejects)}")
        return {row["key"] for row in rows}

    def _images(self, commit: Commit, files: dict[str, bytes], rejected: set[str]) -> None:
        rows = from_parquet(files[commit.file(".parquet")]).to_pylist()
        good = {row["key"]: row for row in rows if row["status"] == "success"}
        statuses = Counter(row["status"] for row in rows if row["status"] != "success")
        if statuses != Counter(commit.rejects):
            self.problem(
                f"its parquet has {_counts(statuses)} rejects, its commit says "
                f"{_counts(commit.rejects)}"
            )
        keys = []
        for key, fields in read_samples(files[commit.file(".tar")]):
            keys.append(key)
            picture = next((fields[e] for e in IMAGE_EXTENSIONS if e in fields), None)
            if key not in good:
                self.problem("is in the tar, not in the parquet", key)
            elif picture is None:
                self.problem("has no picture in the tar", key)
            elif sha256(picture) != good[key]["sha256"]:
                self.problem("its picture has another sha256 than the parquet says", key)
            elif fields.get("txt", b"").decode() != (good[key]["caption"] or ""):
                self.problem("its caption in the tar is not that of the parquet", key)
        for key in good.keys() - set(keys):
            self.problem("is in the parquet, not in the tar", key)
        if sorted(keys) == sorted(good) and keys != list(good):
            self.problem("tar and parquet have the same samples in another order")
        self._keys(commit, keys)

    def _captions(self, commit: Commit, files: dict[str, bytes], rejected: set[str]) -> None:
        table = from_parquet(files[commit.file(".parquet")])
        keys = list(dict.fromkeys(table["key"].to_pylist()))  # a picture may have several
        if table.num_rows != table.group_by(["key", "number"]).aggregate([]).num_rows:
            self.problem("a caption of one number stands twice")
        self._keys(commit, keys)
        self._pictures(commit, keys, rejected)

    def _mds(self, commit: Commit, files: dict[str, bytes], rejected: set[str]) -> None:
        sidecar = from_parquet(files[commit.file(".parquet")])
        keys, rows = sidecar["key"].to_pylist(), sidecar["row"].to_numpy()
        self._keys(commit, keys)
        self._pictures(commit, keys, rejected)
        if commit.index is None:
            if keys:
                self.problem(f"{len(keys)} samples, but no MDS shard")
            return
        entry = commit.index
        name = stored(entry)["basename"]
        if name not in files:
            self.problem(f"its index entry names {name}, its commit does not")
            return
        shard = unpack(files[name], entry)
        header, samples = decode_shard(shard)
        facts = {"raw_data": shard, "zip_data": files[name] if entry["zip_data"] else None}
        if {n: entry[n] for n in header} != header or not all(
            _describes(entry[kind], header["hashes"], data) for kind, data in facts.items()
        ):
            self.problem("its index entry does not describe its MDS shard")
        count = entry["samples"]
        if self.task.group.startswith("text/"):
            found = self._text(header, samples)
            if len(rows) and not 0 <= rows.min() <= rows.max() < found:
                self.problem(f"its keys point at rows beyond its {found} captions")
            elif len(np.unique(rows)) != found:
                self.problem(f"{found - len(np.unique(rows))} of its captions belong to no sample")
        else:
            read = self._official if self.task.group.startswith("official/") else self._latents
            found = read(header, samples, keys)
            if found != len(keys) or not (rows == np.arange(len(keys))).all():
                self.problem(f"{found} samples, not in the order of its {len(keys)} keys")
        if found != count:
            self.problem(f"{found} rows in its MDS shard, its index entry says {count}")

    def _latents(self, header: dict[str, Any], samples: Any, keys: list[str]) -> int:
        manifest = self.task.manifest
        if isinstance(manifest, LatentsManifest):
            wanted = f"ndarray:{manifest.dtype}:{','.join(map(str, manifest.shape()))}"
            columns = dict(zip(header["column_names"], header["column_encodings"], strict=True))
            if columns.get("latent") != wanted:
                self.problem(f"latents are {columns.get('latent')}, the manifest says {wanted}")
        count = 0
        for count, sample in enumerate(samples, 1):
            key = sample["key"]
            if count > len(keys) or keys[count - 1] != key:
                self.problem("is in the MDS shard, not at this place in the parquet of keys", key)
            if not _finite(sample["latent"]):
                self.problem("its latent has values that are no numbers (NaN or infinite)", key)
        return count

    def _text(self, header: dict[str, Any], samples: Any) -> int:
        manifest = self.task.manifest
        seen: dict[str, list[np.ndarray]] = {}  # an import may have a caption in several vectors
        count = 0
        for count, sample in enumerate(samples, 1):
            tokens, caption, scales = sample["tokens"], sample["caption"], sample.get("scales")
            where = f"caption {count - 1} ({caption[:40]!r})"
            others = seen.setdefault(caption, [])
            if any(np.array_equal(tokens, other) for other in others):
                self.problem(f"{where} is stored twice")
            others.append(tokens)
            if isinstance(manifest, TextManifest):
                length, width = manifest.text_encoder.length, manifest.text_encoder.width
                shape, full = tokens.shape, manifest.text == "full"
                rows_fit = shape[0] == length if full else 0 < shape[0] <= length
                if tokens.dtype != manifest.dtype or shape[1:] != (width,) or not rows_fit:
                    self.problem(
                        f"{where} has {tokens.dtype} tokens {shape}; the manifest says "
                        f"{manifest.dtype} ({'' if full else 'up to '}{length}, {width})"
                    )
            self._scales(where, tokens, scales)
            if not _finite(tokens):
                self.problem(f"{where} has tokens that are no numbers (NaN or infinite)")
        return count

    def _scales(self, where: str, tokens: np.ndarray, scales: np.ndarray | None) -> None:
        """Those of a caption's vectors: with int8, and only with int8."""
        if tokens.dtype != np.int8:
            if scales is not None:
                self.problem(f"{where} has scales beside {tokens.dtype} tokens")
            return
        if scales is None:
            self.problem(f"{where} has int8 tokens without scales")
            return
        wanted = (len(tokens), -(-tokens.shape[-1] // BLOCK))
        if scales.dtype != np.float16 or scales.shape != wanted:
            self.problem(
                f"{where} has {scales.dtype} scales {scales.shape}; its tokens need float16 "
                f"{wanted}"
            )
        if not _finite(scales) or (scales < 0).any():
            self.problem(f"{where} has scales that are negative or no numbers (NaN or infinite)")

    def _official(self, header: dict[str, Any], samples: Any, keys: list[str]) -> int:
        manifest = self.task.manifest
        sizes: dict[str, int] = {}  # column -> bytes
        if isinstance(manifest, OfficialManifest):
            sizes = official.sizes(manifest.resolutions, manifest.vae, manifest.text_encoder)
            wanted = official.columns(manifest.resolutions)
            columns = dict(zip(header["column_names"], header["column_encodings"], strict=True))
            if columns != wanted:
                self.problem(f"columns are {columns}, the manifest says {wanted}")
                sizes = {}
        count = 0
        for count, sample in enumerate(samples, 1):
            key = keys[count - 1] if count <= len(keys) else f"row {count - 1}"
            for name, size in sizes.items():
                if len(sample[name]) != size:
                    found = len(sample[name])
                    self.problem(f"its {name} has {found} bytes, the manifest says {size}", key)
                elif not _finite(np.frombuffer(sample[name], official.DTYPE)):
                    self.problem(f"its {name} has values that are no numbers", key)
        return count

    def _keys(self, commit: Commit, keys: list[str]) -> None:
        """The keys against the commit's count and hash, and against each other."""
        self.found.digests = digests(keys)
        if len(keys) != commit.samples:
            self.problem(f"{len(keys)} samples, its commit says {commit.samples}")
        elif keys_hash(keys) != commit.keys_sha256:
            self.problem("its keys are not those of its commit (keys_sha256 differs)")
        for key, count in Counter(keys).items():
            if count > 1:
                self.problem(f"is there {count} times", key)

    def _pictures(self, commit: Commit, keys: list[str], rejected: set[str]) -> None:
        """Its samples and rejects are the pictures it was made of, less those taken out since."""
        pictures = self._pictures_of(commit)
        if pictures is None:
            return
        for key in sorted(set(keys) - pictures):
            self.problem("there is no picture of this key", key)
        for key in sorted(pictures - set(keys) - rejected - self.task.dropped):
            self.problem("its picture is there, and it was neither made, rejected nor dropped", key)

    def _pictures_of(self, commit: Commit) -> set[str] | None:
        """Keys of the pictures; None where they are gone, broken, or others by now (stale)."""
        group = layout.images_group(self.task.source)
        try:
            images = read_commit(self.store, group, commit.shard)
            if images is None or images.content() != commit.inputs.get("images"):
                return None
            return set(keys_of(self.store, group, images))
        except (BrokenShard, ValueError, TypeError, KeyError, pa.ArrowException):
            return None  # that shard's own check says so


def _describes(facts: dict[str, Any] | None, hashes: list[str], data: bytes | None) -> bool:
    """Whether an index entry's facts of a file are those of its bytes."""
    if facts is None or data is None:
        return facts is None and data is None
    if facts["bytes"] != len(data) or sorted(facts["hashes"]) != hashes:
        return False
    if not hashes:
        return True
    from streaming.base.hashing import get_hash  # takes seconds to import

    return all(get_hash(name, data) == value for name, value in facts["hashes"].items())


def _finite(values: np.ndarray) -> bool:
    if values.dtype == np.float16:  # by its exponent: ten times as fast as numpy's own answer
        return not ((values.view(np.uint16) & 0x7C00) == 0x7C00).any()
    return bool(np.isfinite(values).all())


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "no"

"""Any WebDataset: tars of samples whose files share a name up to the first dot."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from pipeline.core import remote
from pipeline.core.errors import SettingError
from pipeline.core.location import located
from pipeline.core.rules import Rules, readable
from pipeline.core.samples import ImageRef, InputShard, RawImage, Reject, sample_key
from pipeline.sources.files import archives, hub, transfer
from pipeline.sources.files.hosted import Hosted
from pipeline.sources.files.wds_samples import Sample, samples, split_name
from pipeline.sources.tables.captions import caption_text

MAX_TARS = 100_000  # ids have five digits
MAX_JSON_BYTES = 1 << 20  # in memory it may take thirty times as much


class WebDataset(Hosted):
    """Settings of the source."""

    rules: ClassVar[Rules] = Rules()

    #: Tars in order: "data/{00000..00031}.tar", "a-*.tar", several with spaces between. Paths or
    #: URLs (http(s)://, s3://, gs://, hf://datasets/OWNER/NAME/…), or relative to `base`.
    tars: Annotated[str, Field(min_length=1)]
    base: str = ""  # a folder, a URL, or hf://datasets/OWNER/NAME[@REVISION]
    #: Where captions are: "txt", "json:FIELD", "parquet:COLUMN" (a parquet beside each tar, as
    #: img2dataset writes, or `sidecar`), or "none": a captioner writes them.
    caption: Annotated[str, Field(pattern=r"^(\w+|(json|parquet):.+)$")] = "txt"
    sidecar: str = ""  # one parquet for all tars, or a pattern of as many as there are tars
    sidecar_key: str = "key"  # its column with the samples' names: the last part, without endings
    image: str = ""  # the ending of a sample's picture; "": the first that is one
    split: str = "train"  # any other is not trained on
    samples_per_tar: Annotated[int, Field(ge=1)] = 10_000  # about: for --limit and estimates
    #: Digits of a sample's place in its tar; 5 where a tar may hold more than 10,000.
    digits: Annotated[int, Field(ge=4, le=6)] = 4

    @field_validator("tars", "sidecar")
    @classmethod
    def _no_users(cls, value: str) -> str:
        if re.search(r"//[^/\s]*@", value.replace("hf://datasets/", "")):
            raise ValueError("must hold no user or password")
        return " ".join(map(located, value.split()))

    def bases(self) -> list[str]:
        hosts = [_hub_base(word) for word in f"{self.tars} {self.sidecar}".split()]
        return sorted({base for base in (self.base, *hosts) if base})

    def shards(self) -> list[InputShard]:
        """A tar is a shard. Only a pattern with * asks what there is."""
        tars = self._expanded(self.tars)
        if not tars:
            raise SettingError(f"tars={self.tars}: there are none")
        if self.sidecar and self._parquet() is None:
            raise SettingError(f"sidecar={self.sidecar}: needs caption=parquet:COLUMN")
        sidecars = self._expanded(self.sidecar)
        if len(sidecars) > 1 and len(sidecars) != len(tars):
            raise SettingError(f"sidecar={self.sidecar}: {len(sidecars)} for {len(tars)} tars")
        # Queries may hold signatures: they are no part of what a shard is.
        return [
            InputShard(f"{number:05d}", self.split, (self._public(tar),))
            for number, tar in enumerate(tars)
        ]

    def fetch(
        self, shard: InputShard, only: frozenset[str] | None = None
    ) -> Iterator[RawImage | Reject]:
        """The tar's samples in its order.

        Raises:
            TransferError, BrokenArchive: it cannot be had whole.
        """
        tar = self._given(shard, self.tars)
        with transfer.local(self._where(tar)) as path:
            captions = self._captions(shard, tar, path)
            readers = samples(archives.members(path, self._is_read))
            for index, found in enumerate(readers):
                try:
                    key = sample_key(shard.id, index, self.digits)
                except ValueError:
                    raise SettingError(
                        f"digits={self.digits}: {path.name} has more than {10**self.digits} "
                        f"samples; set digits={self.digits + 1}"
                    ) from None
                if only is None or key in only:
                    yield self._sample(key, found, self._public(self._where(tar)), captions)

    def decisive(self) -> dict[str, Any]:
        chosen = {
            name: getattr(self, name) for name in ("caption", "sidecar_key", "image", "digits")
        }
        sidecar = " ".join(map(self._public, self.sidecar.split()))
        return {**super().decisive(), **chosen, "sidecar": sidecar}

    def estimate(self, shard: InputShard) -> int:
        return self.samples(shard) * 110_000

    def samples(self, shard: InputShard) -> int:
        return self.samples_per_tar

    def _sample(
        self, key: str, found: Sample, url: str, captions: dict[str, Any] | None
    ) -> RawImage | Reject:
        if found.refused is not None:
            return Reject(key, "download", found.refused.reason, found.refused.detail)
        name = self._picture(found)
        if name is None:
            if any(map(archives.is_picture, found.names.values())) and not self.image:
                return Reject(key, "download", "undecodable", f"{found.stem[:200]!r}: no bytes")
            held = ", ".join(sorted(found.names)) or "nothing"
            return Reject(key, "download", "no-picture", f"{found.stem[:200]!r} has {held}")
        facts = _json(found.data.get("json", b""))
        texts = _texts(self._caption(found, facts, captions))
        if not texts and self.caption != "none":
            detail = f"{found.stem[:200]!r}: nothing at {self.caption}"
            return Reject(key, "download", "no-caption", detail)
        # img2dataset notes where on the web a picture was.
        origin = facts.get("url") if isinstance(facts, dict) else None
        inside = f"{url}/{found.names[name].removeprefix('./')}"
        where = readable(origin)[:4000] if isinstance(origin, str) else inside
        references = texts if len(texts) > 1 else ()
        ref = ImageRef(key, where, texts[0] if texts else "", references)
        return RawImage(ref, found.data[name])

    def _is_read(self, name: str) -> bool:
        ending = split_name(name)[1]
        return ending in ("json", self.caption, self.image) or archives.is_picture(name)

    def _picture(self, found: Sample) -> str | None:
        if self.image:
            return self.image if self.image in found.data else None
        return next((e for e in found.data if e in archives.PICTURES), None)

    def _caption(self, found: Sample, facts: Any, captions: dict[str, Any] | None) -> Any:
        kind, _, name = self.caption.partition(":")
        if kind == "none":
            return ""
        if captions is not None:
            return captions.get(PurePosixPath(found.stem).name)
        if kind == "json":
            for part in name.split("."):
                facts = facts.get(part) if isinstance(facts, dict) else None
            return facts
        data = found.data.get(kind)
        return None if data is None else caption_text(data)

    def _parquet(self) -> str | None:
        kind, _, name = self.caption.partition(":")
        return name if kind == "parquet" else None

    def _captions(self, shard: InputShard, tar: str, path: Path) -> dict[str, Any] | None:
        """Sample name -> caption of this tar, from its parquet; None where they are in the tar."""
        column = self._parquet()
        if column is None:
            return None
        import pyarrow as pa
        import pyarrow.parquet as pq

        stems = {PurePosixPath(split_name(name)[0]).name for name in archives.names(path)}
        sidecars = self._expanded(self.sidecar) or [_beside(tar)]
        sidecar = sidecars[0] if len(sidecars) == 1 else self._given(shard, self.sidecar)
        shared = bool(self.sidecar) and len(sidecars) == 1  # by all tars
        with transfer.local(self._where(sidecar), keep=shared) as file:
            try:
                table = pq.read_table(
                    file,
                    columns=[self.sidecar_key, column],
                    filters=[(self.sidecar_key, "in", sorted(stems))],
                    use_threads=False,
                )
            except (pa.ArrowException, KeyError) as error:
                first = str(error).splitlines()[0]
                raise SettingError(f"sidecar {transfer.public(sidecar)}: {first}") from None
        keys = table.column(self.sidecar_key).to_pylist()
        return dict(zip(keys, table.column(column).to_pylist(), strict=True))

    def _given(self, shard: InputShard, pattern: str) -> str:
        """The shard's own of several files. A shard names its tar without the query."""
        if pattern == self.tars and "?" not in pattern:
            return shard.spec[0]
        return self._expanded(pattern)[int(shard.id)]

    def _public(self, name: str) -> str:
        """A URL without what may be secret. In the name of a local file, # and ? are letters."""
        return transfer.public(name) if "://" in self._where(name) else name

    def _where(self, name: str) -> str:
        if base := _hub_base(name):
            return self.url(hub.parse(name).path, base)
        if "://" in name or name.startswith("/") or not self.base:
            return name
        return self.url(name)

    def _expanded(self, pattern: str) -> list[str]:
        from braceexpand import braceexpand

        found: list[str] = []
        for word in pattern.split():
            try:
                names = list(islice(braceexpand(word), MAX_TARS + 1))
            except ValueError as error:
                raise SettingError(f"{word}: {error}") from None
            for name in names:
                found += self._matches(name) if "*" in name else [name]
        if len(found) > MAX_TARS:
            raise SettingError(f"{pattern}: over {MAX_TARS} files; make it several sources")
        return found

    def _matches(self, pattern: str) -> list[str]:
        """What there is, sorted, in the form in which it was asked for."""
        where = self._where(pattern)
        if where.startswith("hf://"):
            address = hub.parse(where)
            test = re.compile(re.escape(address.path).replace(r"\*", "[^/]*"))
            paths = hub.files(address.repo, address.revision)
            within = where.removesuffix(address.path)
            found = [within + path for path in paths if test.fullmatch(path)]
        elif "://" not in where:
            found = sorted(glob.glob(where))
        else:
            found = _listed(where)
        # The pattern may be relative, or name a branch; what was found says more than that.
        given = pattern[: pattern.index("*")]
        known = where[: where.index("*")]
        return [given + name.removeprefix(known) for name in found]


def _listed(url: str) -> list[str]:
    """URLs that a pattern matches on an object store, sorted.

    Raises:
        SettingError: it cannot be listed.
    """
    protocol = url.split("://")[0]
    try:
        names = remote.connect(url, protocol).glob(url)
        # With the protocol's name that was given: s3a is s3, and fsspec would say so.
        return sorted(name if "://" in name else f"{protocol}://{name}" for name in names)
    except Exception as error:  # clients have no common base
        text = transfer.harmless(str(error) or type(error).__name__)
        raise SettingError(f"{transfer.public(url)}: cannot be listed: {text}") from None


def _hub_base(url: str) -> str:
    """hf://datasets/OWNER/NAME[@REVISION] of a file's URL; "" of any other."""
    found = re.match(r"hf://datasets/[^/]+/[^/]+", url)
    return found[0] if found else ""


def _beside(tar: str) -> str:
    """The parquet of a tar's name; of a URL with a query, the same query."""
    path, mark, query = tar.partition("?")
    return re.sub(r"\.(tar|tgz|tar\.\w+)$", "", path) + ".parquet" + mark + query


def _json(data: bytes) -> Any:
    """What a sample's json says; nothing where it is none, or no description of a picture."""
    if len(data) > MAX_JSON_BYTES:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _texts(value: Any) -> tuple[str, ...]:
    """A caption, or a list of them, as those that say something."""
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, str) and readable(v))

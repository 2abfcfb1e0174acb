"""Any WebDataset: tars of samples whose files share a name up to the first dot."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from pipeline.core import remote
from pipeline.core.errors import SettingError
from pipeline.core.links import harmless, public
from pipeline.core.location import located
from pipeline.core.rules import Rules, readable
from pipeline.core.samples import ImageRef, InputShard, RawImage, Reject, sample_key
from pipeline.sources.files import archives, hub, transfer
from pipeline.sources.files.archives import is_picture
from pipeline.sources.files.hosted import Hosted
from pipeline.sources.files.wds_samples import Sample, samples, split_name
from pipeline.sources.holdout import SPLIT, Share, is_held_out
from pipeline.sources.tables.captions import BadText, Encoding, caption_text
from pipeline.sources.tables.sidecars import captions_of

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
    #: Its column with the samples' names, with their folders and without endings; in a tar's own
    #: parquet the last part will do where no other sample of the tar has it.
    sidecar_key: str = "key"
    image: str = ""  # the ending of a sample's picture; "": the first that is one
    #: Where a sample's name ends: at the first dot of a file's name, as webdataset has it, or at
    #: the last one, where names have dots of their own.
    name_ends: Literal["first-dot", "last-dot"] = "first-dot"
    encoding: Encoding = "auto"  # of captions in text files: UTF-8, UTF-16, or as it says
    split: str = "train"  # any other is not trained on
    holdout: Share = 0.0  # this share of the tars, by a hash of their names, is split "heldout"
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
            InputShard(f"{number:05d}", SPLIT if held else self.split, (name,))
            for number, name in enumerate(map(self._public, tars))
            for held in [is_held_out(name, self.holdout)]
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
            named = {_like(kind, self.image) for kind in (self.caption, "json")} | {self.image}
            readers = samples(archives.members(path, self._is_read), self._last, named)
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
        # What is as it always was is not said: it makes nothing stale.
        fields = {name: type(self).model_fields[name].default for name in ("name_ends", "encoding")}
        later = {n: getattr(self, n) for n, usual in fields.items() if getattr(self, n) != usual}
        return {**super().decisive(), **chosen, "sidecar": sidecar, **later}

    def estimate(self, shard: InputShard) -> int:
        return self.samples(shard) * 110_000

    def samples(self, shard: InputShard) -> int:
        return self.samples_per_tar

    def _sample(
        self, key: str, found: Sample, url: str, captions: dict[str, Any] | None
    ) -> RawImage | Reject:
        named = ImageRef(key, f"{url}/{found.stem}", "")

        def reject(reason: str, detail: str) -> Reject:
            return Reject(key, "download", reason, detail, named)

        stem = f"{found.stem[:200]!r}"
        if found.refused is not None:
            return reject(found.refused.reason, found.refused.detail)
        pictures = self._pictures(found)
        if not pictures:
            held = ", ".join(sorted(found.names)[:20]) or "nothing"
            return reject("no-picture", f"{stem} has {held}")
        name = pictures[0]
        if len(pictures) > 1 and "." in name:
            some = ", ".join(pictures[:3])
            return reject(
                "several-pictures", f"{stem} has {len(pictures)}: {some}; see name_ends, image"
            )
        if name not in found.data:
            return reject("undecodable", f"{stem}: no bytes")
        facts = _json(found.data.get(_like("json", name), found.data.get("json", b"")))
        try:
            texts = _texts(self._caption(found, name, facts, captions), self.caption)
        except BadText as error:
            return reject("caption-encoding", f"{stem}: {error}")
        if not texts and self.caption != "none":
            return reject("no-caption", f"{stem}: nothing at {self.caption}")
        # img2dataset notes where on the web a picture was.
        origin = facts.get("url") if isinstance(facts, dict) else None
        inside = f"{url}/{found.names[name].removeprefix('./')}"
        where = readable(origin)[:4000] if isinstance(origin, str) else inside
        references = texts if len(texts) > 1 else ()
        ref = ImageRef(key, where, texts[0] if texts else "", references)
        return RawImage(ref, found.data[name])

    @property
    def _last(self) -> bool:
        return self.name_ends == "last-dot"

    def _is_read(self, name: str) -> bool:
        ending = split_name(name, self._last)[1]
        kinds = ("json", self.caption, self.image)
        return ending in kinds or ending.rpartition(".")[2] in kinds[:2] or is_picture(name)

    def _pictures(self, found: Sample) -> list[str]:
        """Endings of a sample's pictures, the one to take first; those with bytes come first."""
        if self.image:
            return [self.image] if self.image in found.data else []
        plain = [e for e in found.names if e in archives.PICTURES]
        plain.sort(key=lambda ending: ending not in found.data)
        # "1.jpg": what webdataset has for the field of a file "photo.1.jpg".
        return plain or [e for e, name in found.names.items() if is_picture(name)]

    def _caption(
        self, found: Sample, picture: str, facts: Any, captions: dict[str, Any] | None
    ) -> Any:
        kind, _, name = self.caption.partition(":")
        if kind == "none":
            return ""
        if captions is not None:
            return captions.get(found.stem)
        if kind == "json":
            for part in name.split("."):
                facts = facts.get(part) if isinstance(facts, dict) else None
            return facts
        data = found.data.get(_like(kind, picture), found.data.get(kind))
        return None if data is None else caption_text(data, self.encoding)

    def _parquet(self) -> str | None:
        kind, _, name = self.caption.partition(":")
        return name if kind == "parquet" else None

    def _captions(self, shard: InputShard, tar: str, path: Path) -> dict[str, Any] | None:
        """Sample's name -> caption of this tar, from its parquet; None where they are in the tar.

        Raises:
            SettingError: no such column, or none with names.
        """
        column = self._parquet()
        if column is None:
            return None
        stems = {split_name(name, self._last)[0] for name in archives.names(path)}
        sidecars = self._expanded(self.sidecar) or [_beside(tar)]
        sidecar = sidecars[0] if len(sidecars) == 1 else self._given(shard, self.sidecar)
        shared = bool(self.sidecar) and len(sidecars) == 1  # by all tars
        with transfer.local(self._where(sidecar), keep=shared) as file:
            try:
                return captions_of(file, self.sidecar_key, column, stems, own=not shared)
            except (pa.ArrowException, KeyError, OSError, ValueError) as error:
                first = str(error).splitlines()[0]
                raise SettingError(f"sidecar {public(sidecar)}: {first}") from None

    def _given(self, shard: InputShard, pattern: str) -> str:
        """The shard's own of several files. A shard names its tar without a link's query."""
        if pattern == self.tars and not (self._is_link(pattern) and "?" in pattern):
            return shard.spec[0]
        return self._expanded(pattern)[int(shard.id)]

    def _public(self, name: str) -> str:
        """A link without what may be secret. In the name of any other file # and ? are letters."""
        return public(name) if self._is_link(name) else name

    def _is_link(self, name: str) -> bool:
        return self._where(name).startswith(("http://", "https://"))

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
        elif "://" not in where:  # only * is a pattern, and in what the user gave
            found = sorted(glob.glob("*".join(map(glob.escape, where.split("*")))))
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
        fs = remote.connect(url, protocol)
        # Folder by folder, by name: a client's own patterns also know [, ] and ?.
        known, *parts = re.split(r"/(?=[^/]*\*)", fs._strip_protocol(url), maxsplit=1)
        names = [known]
        for part in parts[0].split("/") if parts else ():
            names = [found for name in names for found in _below(fs, name, part)]
        # With the protocol's name that was given: s3a is s3, and fsspec would say so.
        return sorted(name if "://" in name else f"{protocol}://{name}" for name in names)
    except Exception as error:  # clients have no common base
        text = harmless(str(error) or type(error).__name__)
        raise SettingError(f"{public(url)}: cannot be listed: {text}") from None


def _below(fs: Any, folder: str, part: str) -> list[str]:
    """What lies in a folder under a name, in which * stands for any letters."""
    test = re.compile(re.escape(part).replace(r"\*", ".*"), re.DOTALL)
    try:
        rows = fs.ls(folder, detail=True)
    except FileNotFoundError:
        return []
    names = (row["name"].rstrip("/") for row in rows)
    return [name for name in names if test.fullmatch(name.rpartition("/")[2])]


def _hub_base(url: str) -> str:
    """hf://datasets/OWNER/NAME[@REVISION] of a file's URL; "" of any other."""
    found = re.match(r"hf://datasets/[^/]+/[^/]+", url)
    return found[0] if found else ""


def _like(kind: str, picture: str) -> str:
    """The ending of a picture's text or JSON: of "1.jpg" "1.txt"."""
    before, dot, _ = picture.rpartition(".")
    return f"{before}{dot}{kind}"


def _beside(tar: str) -> str:
    """The parquet of a tar's name; of a link with a query, the same query."""
    path, mark, query = tar.partition("?") if re.match("https?://", tar) else (tar, "", "")
    return re.sub(r"\.(tar|tgz|tar\.\w+)$", "", path) + ".parquet" + mark + query


def _json(data: bytes) -> Any:
    """What a sample's json says; nothing where it is none, or no description of a picture."""
    if len(data) > MAX_JSON_BYTES:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _texts(value: Any, place: str) -> tuple[str, ...]:
    """A caption, or a list of them, as those that say something.

    Raises:
        BadText: there are but such that are no UTF-8.
    """
    values = value if isinstance(value, list) else [value]
    found = tuple(v for v in values if isinstance(v, str) and readable(v))
    if not found and any(isinstance(v, bytes) for v in values):
        raise BadText(f"{place} is no UTF-8")
    return found

"""Which column groups an export to the official layout joins, and what makes those that lack."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TypeVar

from pipeline.core import layout
from pipeline.core.errors import SettingError
from pipeline.core.manifest import LatentsManifest, Manifest, TextManifest, read_manifest
from pipeline.core.store import Store

M = TypeVar("M", bound=Manifest)


@dataclass(frozen=True)
class ExportSettings:
    """Which groups to join."""

    vae: str
    text_encoder: str
    resolutions: tuple[int, ...]
    captions: str = "alt"
    latents: str = "mean"  # the kind of the groups: mean, sample or moments
    crop: str = "center"
    split: str = "train"  # the official loader streams all that it finds: one split an export
    name: str = ""  # of the export; "" gives mds_latents_<vae>_<text encoder>[_<split>]
    dequantise: bool = False  # take int8 token vectors, and give what they stand for

    def group(self, source: str) -> str:
        """Raises SettingError where the name is a path."""
        if "/" in self.name:
            raise SettingError(
                f"--out {self.name}: give a name; the export is a group of the root, "
                f"{source}/official/NAME, and can be moved from there as a whole"
            )
        split = "" if self.split == "train" else f"_{self.split}"
        name = f"mds_latents_{layout.slug(self.vae)}_{layout.slug(self.text_encoder)}{split}"
        return layout.official_group(source, self.name or name)


class Groups:
    """Finds the groups that an export reads, or says which command makes them."""

    def __init__(self, store: Store, source: str, settings: ExportSettings) -> None:
        self.store, self.source, self.settings = store, source, settings

    def latents_group(self, resolution: int) -> str:
        s = self.settings
        return layout.latents_group(self.source, s.vae, resolution, s.latents, s.crop)

    def latents(self, resolution: int) -> LatentsManifest:
        group = self.latents_group(resolution)
        parent = group.rpartition("/")[0]
        there = [n for n in self.store.folders(parent) if n.split(".")[0] == str(resolution)]
        found = f" (there: {', '.join(there)}; --latents and --crop choose)" if there else ""
        return self._manifest(group, LatentsManifest, found)

    def text(self) -> tuple[str, TextManifest]:
        s = self.settings
        names = {
            dtype: layout.text_group(self.source, s.text_encoder, s.captions, "full", dtype)
            for dtype in ("float16", "int8")
        }
        group = names["int8"] if s.dequantise else names["float16"]
        trimmed = layout.text_group(self.source, s.text_encoder, s.captions, "trimmed")
        found = ""
        if not s.dequantise and self.store.exists(f"{names['int8']}/manifest.json"):
            found = " (int8 is there: --dequantise takes it)"
        elif any(self.store.exists(f"{t}/manifest.json") for t in (trimmed, f"{trimmed}.int8")):
            found = " (trimmed is there, and its padded rows can only be made by the encoder)"
        return group, self._manifest(group, TextManifest, found)

    def command(self) -> str:
        """The command that makes all of them."""
        s = self.settings
        words = ["pipeline", "run", "encode", "--root", self.store.root, "--source", self.source]
        words += ["--vae", s.vae, "--text-encoder", s.text_encoder, "--captions", s.captions]
        words += ["--resolutions", ",".join(map(str, s.resolutions)), "--text", "full"]
        words += ["--text-dtype", "int8"] if s.dequantise else []
        words += ["--latents", s.latents] if s.latents != "mean" else []
        words += ["--crop", s.crop] if s.crop != "center" else []
        return f"`{shlex.join(words)}`"

    def _manifest(self, group: str, kind: type[M], found: str) -> M:
        try:
            manifest = read_manifest(self.store, group)
        except FileNotFoundError:
            raise SettingError(
                f"export: nothing at {self.store.url(group)}{found}; run {self.command()}"
            ) from None
        if not isinstance(manifest, kind):
            raise SettingError(f"{self.store.url(group)}: its manifest is of kind {manifest.kind}")
        return manifest

"""`pipeline convert export`: column groups to the official code's single MDS, without an encoder.

A latents group for each resolution and one text group of all rows are joined by key within each
input shard; each input shard becomes one MDS shard. A worker holds about three times that shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from pipeline.core import drops, facts
from pipeline.core.catalog import Catalog
from pipeline.core.commits import MAX_REJECT_RATE, Commit, read_commit, read_file, write_shard
from pipeline.core.errors import BrokenShard, SettingError
from pipeline.core.manifest import Manifest, OfficialManifest, mismatches, read_manifest
from pipeline.core.mds import decode_shard, encode_shard, stored, unpack
from pipeline.core.samples import InputShard, Reject
from pipeline.core.stage import Job, Needs
from pipeline.core.store import Store, fingerprint
from pipeline.core.tables import from_parquet, key_rows
from pipeline.official import layout
from pipeline.official.groups import ExportSettings, Groups

VERSION = 1  # bump when the bytes this stage writes change
BYTES_A_CAPTION = 1000  # with its entry in the parquet of keys, at most


class Export:
    name = "export"
    needs = Needs()

    def __init__(
        self,
        store: Store,
        source: str,
        settings: ExportSettings,
        max_reject_rate: float = MAX_REJECT_RATE,
    ) -> None:
        """Reads the groups' manifests.

        Raises:
            SettingError: a group is not there or does not hold what an export needs, or the
                export's name is taken by another one.
        """
        self.source = source
        self.settings = settings
        self.max_reject_rate = max_reject_rate
        self.group = settings.group(source)
        find = Groups(store, source, settings)
        self.latents = {r: find.latents(r) for r in sorted(set(settings.resolutions))}
        if not self.latents:
            raise SettingError("--resolutions: name at least one, e.g. 256,512")
        self.latents_groups = {r: find.latents_group(r) for r in self.latents}
        self.text_group, self.text = find.text()
        self.vae = self.latents[min(self.latents)].vae
        for resolution, manifest in self.latents.items():
            differences = mismatches(self.vae, manifest.vae)
            if differences:
                raise SettingError(
                    f"{source}: latents of {min(self.latents)} and {resolution} px were made by "
                    f"different VAEs ({'; '.join(differences)}); run {find.command()} --stale"
                )
        self._check_name(store)

    def groups(self) -> list[str]:
        return [self.group]

    def plan(self, catalog: Catalog) -> Iterable[Job]:
        split, s = self.settings.split, self.settings
        others = {h.split for h in catalog.heads(self.group).values()} - {split}
        if others:
            raise SettingError(
                f"{self.group} holds split {', '.join(sorted(others))}; choose another --out for "
                f"--split {split}"
            )
        common = {
            "stage": self.name,
            "version": VERSION,
            "split": split,
            "vae": self.vae.model_dump(),
            "text_encoder": self.text.text_encoder.model_dump(),
            "latents": s.latents,
            "crop": s.crop,
            "captions": s.captions,
            "text_dtype": self.text.dtype,
            **layout.form(self.vae),
        }
        for group, manifest in [
            *((self.latents_groups[r], found) for r, found in self.latents.items()),
            (self.text_group, self.text),
        ]:
            self._check_made(catalog, group, manifest)
        latents = {r: catalog.heads(group) for r, group in self.latents_groups.items()}
        dropped = catalog.dropped(self.source)
        for shard, text in catalog.heads(self.text_group).items():
            if text.split != split or not all(shard in heads for heads in latents.values()):
                continue
            keys = dropped.get(shard, frozenset())
            inputs = {
                **common,
                "latents_made": {str(r): heads[shard].content for r, heads in latents.items()},
                "text_made": text.content,
                **drops.inputs(keys),
            }
            yield Job(InputShard(shard, split), {self.group: inputs}, keys, text.samples)

    def notes(self, catalog: Catalog) -> list[str]:
        """What the user should know before a run: shards left out, what is taken of moments."""
        groups = [*self.latents_groups.values(), self.text_group]
        heads = {group: catalog.heads(group) for group in groups}
        every = {
            shard
            for found in heads.values()
            for shard, head in found.items()
            if head.split == self.settings.split
        }
        lines = []
        for group, found in heads.items():
            lost = sorted(every - found.keys())
            if lost:
                lines.append(
                    f"{len(lost)} of {len(every)} shards are not in {group} (first: {lost[0]}): "
                    "left out until they are"
                )
        if not every:
            splits = sorted({head.split for found in heads.values() for head in found.values()})
            there = ", ".join(splits) or "none"
            raise SettingError(
                f"--split {self.settings.split}: {self.source} has no shard of it (there: {there})"
            )
        if self.settings.latents == "moments":
            lines.append("of the stored moments the mean is exported")
        return lines

    def estimate(self, job: Job, group: str) -> int:
        text = self.text.text_encoder
        values = text.length * text.width + sum(map(self._values, self.latents))
        return job.samples * (2 * values + BYTES_A_CAPTION)

    def open(self, store: Store) -> _Worker:
        return _Worker(self, store)

    def _manifest(self) -> OfficialManifest:
        """What the export will be, as far as its name is concerned."""
        s = self.settings
        return OfficialManifest(
            source=self.source,
            vae=self.vae,
            text_encoder=self.text.text_encoder,
            resolutions=list(self.latents),
            crop=s.crop,
            latents="mean" if s.latents == "moments" else s.latents,
            captions=s.captions,
        )

    def _values(self, resolution: int) -> int:
        return self.vae.channels * (resolution // self.vae.downsample) ** 2

    def _check_made(self, catalog: Catalog, group: str, manifest: Manifest) -> None:
        """That the group's shards are those that its manifest describes."""
        stated = facts.of_manifest(manifest)
        for made in {head.facts for head in catalog.heads(group).values()}:
            if lines := facts.clashes(made, stated, rounding=False):
                raise SettingError(
                    f"{catalog.store.url(group)}: its manifest does not describe all of its shards "
                    f"({'; '.join(lines)}): they are being made anew, by a run that was stopped; "
                    "run it again with --stale, or see `pipeline verify`"
                )

    def _check_name(self, store: Store) -> None:
        """What was exported under this name before must have the same columns."""
        try:
            there = read_manifest(store, self.group)
        except FileNotFoundError:
            return
        wanted = self._manifest()
        if isinstance(there, OfficialManifest):
            counts = ("samples", "splits", "shards", "vae", "text_encoder")
            differences = mismatches(wanted, there, ignore=counts)
            if not differences:
                return
            raise SettingError(
                f"{store.url(self.group)} is another export ({'; '.join(differences)}); choose "
                "another --out"
            )
        raise SettingError(f"{store.url(self.group)}: its manifest is of kind {there.kind}")


class _Worker:
    def __init__(self, stage: Export, store: Store) -> None:
        self.stage = stage
        self.store = store

    def take_counters(self) -> Counter[str]:
        return Counter()  # its commits say it all

    def __call__(self, job: Job) -> dict[str, Commit]:
        stage, group = self.stage, self.stage.group
        inputs = job.groups[group]
        text = _Shard(self.store, stage.text_group, job.shard.id, inputs["text_made"])
        latents = {
            r: _Shard(self.store, g, job.shard.id, inputs["latents_made"][str(r)])
            for r, g in stage.latents_groups.items()
        }
        keys, samples, rejects = [], [], []
        every = dict.fromkeys(key for part in (*latents.values(), text) for key in part.rows)
        for key in every:
            if key in job.dropped:
                continue
            sample = self._sample(key, latents, text)
            if isinstance(sample, Reject):
                rejects.append(sample)
            else:
                keys.append(key)
                samples.append(sample)
        stem = f"{job.shard.id}-{fingerprint(inputs)}"
        files, entry = {f"{stem}.parquet": key_rows(keys, range(len(keys)))}, None
        if samples:
            columns = layout.columns(list(latents))
            data, entry = encode_shard(columns, samples, f"{stem}.mds")
            files[f"{stem}.mds"] = data
        commit = write_shard(
            self.store,
            group,
            job.shard,
            inputs,
            files,
            keys,
            rejects,
            entry,
            max_reject_rate=stage.max_reject_rate,
        )
        return {group: commit}

    def _sample(self, key: str, latents: dict[int, _Shard], text: _Shard) -> dict | Reject:
        stage = self.stage
        lost = [f"no-latents-{r}" for r, shard in latents.items() if key not in shard.rows]
        lost += ["no-text"] if key not in text.rows else []
        if lost:
            return Reject(key, stage.name, lost[0], f"missing: {', '.join(lost)}")
        caption = text.sample(key)
        facts = stage.text.text_encoder
        tokens = _tokens(caption)
        if tokens.shape != (facts.length, facts.width):
            raise BrokenShard(
                f"{text.where}: {key} has tokens {tokens.shape}; run `pipeline verify`"
            )
        sample = {layout.CAPTION: caption["caption"], layout.TOKENS: tokens.tobytes()}
        for resolution, shard in latents.items():
            raw = shard.sample(key)["latent"]
            if stage.settings.latents == "moments":
                raw = np.split(raw, 2)[0]
            values = layout.to_official(raw, stage.vae, shard.corrections.get(key, b""))
            if values.size != stage._values(resolution):
                raise BrokenShard(f"{shard.where}: {key} has {values.shape}; run `pipeline verify`")
            if not np.isfinite(values).all():
                detail = f"{layout.DTYPE} cannot hold its scaled latent of {resolution} px"
                return Reject(key, stage.name, "non-finite", detail)
            sample[layout.latents_column(resolution)] = values.tobytes()
        return sample


class _Shard:
    """One input shard of a column group, as it was when the run was planned: samples by key."""

    def __init__(self, store: Store, group: str, shard: str, content: str) -> None:
        self.where = f"{group}/{shard}"
        commit = read_commit(store, group, shard)
        if commit is None or commit.content() != content:
            raise BrokenShard(f"{self.where} was redone while this run went on; run it again")
        table = from_parquet(read_file(store, group, commit, ".parquet"))
        keys = table["key"].to_pylist()
        self.rows: dict[str, int] = dict(zip(keys, table["row"].to_pylist(), strict=True))
        self.corrections: dict[str, bytes] = {}
        if layout.CORRECTIONS in table.column_names:
            made = commit.inputs
            if made["vae"]["shift"] and "official_form" not in made:
                raise BrokenShard(
                    f"{self.where} was imported by an earlier release, which applied the VAE's "
                    "shift; run `pipeline convert import --stale` first"
                )
            values = table[layout.CORRECTIONS].to_pylist()
            self.corrections = dict(zip(keys, values, strict=True))
        self._samples: list[dict[str, Any]] = []
        if commit.index is not None:
            data = read_file(store, group, commit, stored(commit.index)["basename"])
            self._samples = list(decode_shard(unpack(data, commit.index))[1])

    def sample(self, key: str) -> dict[str, Any]:
        return self._samples[self.rows[key]]


def _tokens(caption: dict[str, Any]) -> np.ndarray:
    """(L, W) float16."""
    tokens = caption["tokens"]
    if tokens.dtype == layout.DTYPE:
        return tokens
    from pipeline.core.tokens import dequantise

    return dequantise(tokens, caption["scales"])

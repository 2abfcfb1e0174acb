"""Latents streamed from MDS shards, joined with their captions by key, batched.

`StreamingDataset` decides the order: shuffled, the same for any number of ranks and workers, and
resumable in the middle of an epoch through its loader's state.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.util import Finalize
from typing import Any, TypedDict, cast

import numpy as np
import torch
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.shared import SharedArray, _get_path
from torch import distributed

from pipeline.core.errors import BrokenShard, SettingError
from pipeline.core.latents import posterior_sample, to_model
from pipeline.core.manifest import VaeFacts
from pipeline.core.published import Row, read_index
from pipeline.core.store import Store, size
from training.config.plan import TrainingPlan, TrainingSource
from training.config.settings import Config
from training.data.buffers import Pool
from training.data.cache import Cache, open_cache
from training.data.dev_shm import PREFETCH
from training.data.left_out import left_out
from training.data.shard_files import ShardFiles
from training.data.shards import SplitStream
from training.data.shared_memory import named_after, of_first_rank
from training.data.token_vectors import TextGroup
from training.randomness import Rows, keyed_seed, sample_uniform, stage_key
from training.ranks import world_size

REPLACEMENTS = 1000  # samples that are tried in the place of one whose shard is damaged


class Sample(TypedDict):
    """One picture and its caption in one epoch; arrays may be views of the shards."""

    key: str
    caption: str
    latent: np.ndarray  # float16 or, drawn from moments, float32 (C, h, w), raw: as encoded
    tokens: np.ndarray  # float16 (L, W): real rows, or all rows of a full group
    drop: float  # uniform: the caption is dropped where this is below the rate


class LatentText(StreamingDataset):
    """Streams `Sample`s of one or more sources, whole global batches of them in an epoch.

    Args:
        streams: one a source, each with a sample or more.
        vae: facts of the VAE that made all of them.
        shapes: of a latent, (C, h, w), and of the longest caption, (L, W).
        batch_size: samples of this rank in a batch.
        seed: decides the order.
        draws: (seed, stage), which with source, key and epoch decide a sample's random numbers.
        shuffle: False streams in the shards' order.
        skip_damaged: a sample of a shard that is found damaged is replaced by another of its
            source, a function of (seed, stage, epoch, the sample): whoever meets it, on whatever
            rank, takes the same. Checkpoints hold which shards were found.
    """

    def __init__(
        self,
        streams: list[SplitStream],
        vae: VaeFacts,
        shapes: tuple[tuple[int, ...], tuple[int, int]],
        batch_size: int,
        seed: int,
        draws: tuple[int | str, ...],
        shuffle: bool = True,
        skip_damaged: bool = False,
    ) -> None:
        super().__init__(
            streams=streams,
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed,
            num_canonical_nodes=1,  # else the order would depend on the number of nodes
        )
        self.vae = vae
        self.shapes = shapes
        # The library repeats samples where ranks or nodes do not divide an epoch. Of one that ends
        # with a whole global batch it repeats none. What is left out is another part every epoch,
        # as the shuffle comes before the cut.
        ranks = self._parallel_rank_world.num_ranks
        self.epoch_size -= self.epoch_size % (batch_size * ranks)
        self.length = self.epoch_size // ranks
        self._draws = draws
        self._epoch = 0
        self._skip = skip_damaged
        # Of this node, for all ranks and loader processes; new shared memory is zero.
        name = _get_path(self._shm_prefix_int, "damaged")
        self._damaged = SharedArray(self.num_shards, np.uint8, name)

    def damaged(self) -> list[tuple[str, str]]:
        """(source, input shard) of those that were found damaged and are skipped. Every rank has to
        call it: nodes tell each other."""
        found = [self._name(int(place)) for place in np.flatnonzero(self._damaged.numpy())]
        if self._skip and self._unique_rank_world.num_nodes > 1:
            nodes: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(nodes, found)
            found = [name for names in nodes for name in names]
        return sorted({*found})

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Called on every rank."""
        state, damaged = super().state_dict(num_samples, from_beginning), self.damaged()
        return {**state, "damaged": [*map(list, damaged)]} if damaged else state

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Goes on in the middle of an epoch, which ends earlier where samples were dropped since.

        What is left of such an epoch is in another order, so a sample may come twice in it. So it
        is after a roll-back: the order is this dataset's own, not that of the checkpoint.
        """
        obj = dict(obj)
        damaged = {tuple(name) for name in obj.pop("damaged", [])}
        for place in range(self.num_shards) if damaged else ():
            if self._name(place) in damaged:
                self._damaged[place] = 1
        seen = min(obj["sample_in_epoch"], self.epoch_size)
        own = {"sample_in_epoch": seen, "shuffle_seed": self.shuffle_seed}
        super().load_state_dict({**obj, **own})

    def _resume_incr_epoch(self) -> tuple[int, int]:
        """The epoch that begins or goes on in this process, which is told once, here."""
        self._epoch, seen = super()._resume_incr_epoch()
        return self._epoch, seen

    def get_item(self, sample_id: int, retry: int = 7) -> Sample:
        """One sample by its place in the dataset.

        Raises:
            SettingError: the picture has no caption in its text group.
            BrokenShard: its shard is gone or damaged, and must not be skipped, or all are.
            StorageError: the shard cannot be fetched.
        """
        if not self._skip:
            return self._read(sample_id, retry)
        for place in self._candidates(sample_id):
            shard = self.spanner[place][0]
            if self._damaged[shard]:
                continue
            try:
                return self._read(place, retry)
            except BrokenShard as error:
                if not self._skip:
                    raise
                self._leave_out(shard, error)
        source, _ = self._name(self.spanner[sample_id][0])
        raise BrokenShard(f"{source}: too many of its shards are damaged to go on without them")

    def _read(self, sample_id: int, retry: int) -> Sample:
        stored: dict[str, Any] = super().get_item(sample_id, retry)
        key, latent, reader = stored["key"], stored["latent"], stored["reader"]
        source = reader.stream.source
        text = reader.stream.text
        caption = text.read(reader.input, key)
        length, width = caption.tokens.shape
        if width != self.shapes[1][1] or not 0 < length <= self.shapes[1][0]:
            what = ValueError(f"token vectors of shape {[length, width]}")
            raise text.files.damaged(reader.input, what)
        draws = (*self._draws, source.name, key, self._epoch)
        if source.latents.latents == "moments":
            latent = posterior_sample(_float32(latent), "latent", *draws)
        return Sample(
            key=key,
            caption=caption.text,
            latent=latent,
            tokens=caption.tokens,
            drop=sample_uniform("drop", *draws),
        )

    def _candidates(self, sample_id: int) -> Iterator[int]:
        """The sample itself, and those of its source that take its place, in turn."""
        yield sample_id
        stream = self.stream_per_shard[self.spanner[sample_id][0]]
        first, count = self.sample_offset_per_stream[stream], self.samples_per_stream[stream]
        key = (*self._draws, "instead", self._epoch, int(sample_id))
        for attempt in range(REPLACEMENTS):
            yield int(first + keyed_seed(*key, attempt) % int(count))

    def _leave_out(self, shard: int, error: BrokenShard) -> None:
        if not self._damaged[shard]:
            self._damaged[shard] = 1
            source, name = self._name(shard)
            print(
                f"train: shard {name} of {source} is left out from here on "
                f"({int(self._damaged.numpy().sum())} of {self.num_shards} shards): {error}",
                file=sys.stderr,
                flush=True,
            )

    def _name(self, shard: int) -> tuple[str, str]:
        reader: Any = self.shards[shard]
        return reader.stream.source.name, reader.input


def make_dataset(
    plan: TrainingPlan, stage: str, shuffle: bool = True, rollbacks: int = 0
) -> LatentText:
    """The dataset of one stage of a run; its order is a function of (seed, stage, rollbacks)."""
    config, data = plan.config, plan.config.data
    store = Store(data.root)
    cache = open_cache(plan)
    weights = config.sources_of(config.stages[stage])
    streams = []
    for source in plan.data[stage]:
        # What is published or taken out just now must count on every rank or on none: all would
        # deal the samples differently.
        rows, out = of_first_rank(_find(store, source, config))
        files = ShardFiles(store, source.latents_group, rows, cache, data.check_hashes)
        captions = read_index(store, source.text_group)
        text = ShardFiles(store, source.text_group, captions, cache, data.check_hashes)
        _check_cache(cache, files, text)
        weight = weights[source.name] if isinstance(weights, dict) else None
        group = TextGroup(text, source.command(config))
        streams.append(SplitStream(source, files, group, out, weight))
    side = plan.latent_side(config.stages[stage])
    shapes = (plan.vae.channels, side, side), (plan.text.length, plan.text.width)
    batch_size = config.stages[stage].batch_size // world_size()
    key = stage_key(stage, rollbacks)
    seed = keyed_seed(config.seed, "order", key) % (1 << 31)
    with named_after(config.run_folder()):
        return LatentText(
            streams,
            plan.vae,
            shapes,
            batch_size,
            seed,
            (config.seed, key),
            shuffle,
            data.skip_damaged,
        )


def _find(
    store: Store, source: TrainingSource, config: Config
) -> tuple[list[Row], dict[str, list[int]]]:
    """The shards of the split, and which of their rows are left out."""
    group, command = source.latents_group, source.command(config)
    split = config.data.split
    rows = [row for row in read_index(store, group) if row[1]["split"] == split]
    out = left_out(store, source.name, group, source.text_group, rows, command)
    return rows, out.rows


def _check_cache(cache: Cache, *groups: ShardFiles) -> None:
    """Raises SettingError where the cache could not hold what loader processes look at."""
    largest = sum(files.largest() for files in groups if files.cached)
    if cache.limit and cache.limit < 4 * largest:
        raise SettingError(
            f"data.cache_limit: shards of {groups[0].group} and their captions take up to "
            f"{size(largest)}; give at least four times that, {size(4 * largest)}"
        )


def make_loader(
    dataset: LatentText, workers: int, trimmed: bool, multiple: int = 1
) -> StreamingDataLoader:
    """Batches of `collate`, all full: what is left over at the end of an epoch is left out."""
    latents, tokens = dataset.shapes
    size = cast(int, dataset.batch_size)
    # Those that a process makes ahead, and one that the trainer is at.
    buffers = functools.partial(Pool, workers, PREFETCH + 1)
    ending = torch.zeros(1, dtype=torch.uint8).share_memory_()
    Finalize(None, ending.fill_, (1,), exitpriority=10)  # before the library ends the processes
    return StreamingDataLoader(
        dataset,
        batch_size=size,
        collate_fn=functools.partial(
            collate,
            vae=dataset.vae,
            trimmed=trimmed,
            multiple=multiple,
            longest=tokens[0],
            pools=(
                buffers(size * math.prod(latents) * torch.float32.itemsize),
                buffers(size * math.prod(tokens) * torch.float16.itemsize),
            ),
        ),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
        worker_init_fn=functools.partial(_outlive_sigterm, ending),
    )


def _outlive_sigterm(ending: torch.Tensor, worker: int) -> None:
    """Slurm sends it to all processes of a job, and the trainer ends its step, for which it needs
    its loaders. When the trainer itself ends, the library sends it, and waits for them."""

    def ask(number: int, frame: Any) -> None:
        if ending.item():
            os._exit(0)  # as torch's own handler; it takes any other end for a failure

    signal.signal(signal.SIGTERM, ask)


def collate(
    samples: list[Sample],
    vae: VaeFacts,
    trimmed: bool,
    pools: tuple[Pool, Pool],
    multiple: int = 1,
    longest: int = 0,
) -> dict[str, torch.Tensor]:
    """Samples -> the tensors of a batch.

    Args:
        pools: where latents and y are made.
        multiple: captions are padded to a multiple of this, but not beyond `longest`: compiled code
            has a graph for each length.

    Returns:
        latents float32 (B, C, h, w), shifted and scaled; y float16 (B, L, W), padded with zero rows
        to the longest caption; y_mask bool (B, L), True for real rows, in a trimmed batch only;
        drop float32 (B,), the samples' uniform numbers; index int64 (B,), the places in this rank's
        batch, which micro-batches need to find the step's random numbers.
    """
    lengths = [len(sample["tokens"]) for sample in samples]
    rows, width = max(lengths), samples[0]["tokens"].shape[1]
    if multiple > 1:
        rows = max(rows, min(-(-rows // multiple) * multiple, longest))
    y, sent_y = pools[1].new((len(samples), rows, width), torch.float16)
    for row, sample, length in zip(y.numpy(), samples, lengths, strict=True):
        row[:length] = sample["tokens"]
        row[length:] = 0
    raw = np.stack([sample["latent"] for sample in samples])
    latents, sent_latents = pools[0].new(raw.shape, torch.float32)
    # torch turns half into single precision with the processor's instruction, numpy without it.
    latents.copy_(torch.from_numpy(raw))
    latents.copy_(to_model(latents, vae))
    batch = {
        "latents": sent_latents,
        "y": sent_y,
        "drop": torch.tensor([sample["drop"] for sample in samples]),
        "index": torch.arange(len(samples)),
    }
    if trimmed:
        batch["y_mask"] = torch.arange(rows) < torch.tensor(lengths)[:, None]
    return batch


def _float32(values: np.ndarray) -> np.ndarray:
    # The copy is for torch, which warns of arrays that may not be written to.
    return torch.from_numpy(values.copy()).float().numpy()


def global_rows() -> Rows:
    """Which rows of the global batch this rank's loader gives, in StreamingDataset's partition.

    Sample j of a rank is row (j * ranks + local rank) * nodes + node of what one rank would get.
    """
    ranks = world_size()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks)
    nodes = ranks // per_node
    local = int(os.environ.get("LOCAL_RANK") or 0)
    node = int(os.environ.get("NODE_RANK") or 0)
    return Rows(first=local * nodes + node, step=ranks)

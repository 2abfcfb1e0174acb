"""Latents streamed from MDS shards, joined with their captions by key, batched.

`StreamingDataset` decides the order: shuffled, the same for any number of ranks and workers, and
resumable in the middle of an epoch through its loader's state.
"""

from __future__ import annotations

import bisect
import functools
import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from streaming import Stream, StreamingDataLoader, StreamingDataset
from streaming.base.format.mds import MDSReader

from pipeline.core import drops
from pipeline.core.latents import to_model
from pipeline.core.manifest import VaeFacts
from pipeline.core.store import Store
from training.preflight import Plan, Source, world_size
from training.randomness import Rows, keyed_seed
from training.takedown import dropped_rows
from training.text import TextGroup

T = TypeVar("T")

OPEN_SHARDS = 1024  # in each loader process; the kernel allows 65,530 maps


class Sample(TypedDict):
    """One picture as the network sees it."""

    key: str
    caption: str
    latent: np.ndarray  # float32 (C, h, w), shifted and scaled
    tokens: np.ndarray  # float16 (L, W): real rows, or all rows of a full group


class SplitStream(Stream):
    """The shards of one split of a latents group; the index says which they are.

    Args:
        text: the captions of the same source.
        dropped: input shard -> keys of samples that are not to be streamed.
        command: what makes the group, for error messages.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        split: str,
        cache: Path,
        text: TextGroup,
        dropped: dict[str, frozenset[str]],
        command: str,
    ) -> None:
        url = store.url(source.latents_group)
        if store.local and not source.packed:
            super().__init__(local=url)
        else:
            super().__init__(remote=url, local=str(cache / source.latents_group))
        self.wanted_split = split
        self.text = text
        self.dropped = dropped
        self.command = command
        self._store, self._group = store, source.latents_group
        self.inputs: list[str] = []  # input shards, in the order of this stream's shards

    def get_shards(self, world, allow_unsafe_types: bool):
        """Readers of the wanted shards only: the others do not exist for the dataset."""
        super().get_shards(world, allow_unsafe_types)  # fetches a remote index, checks the types
        with open(os.path.join(self.local, "index.json"), encoding="utf-8") as file:
            index = json.load(file)
        pairs = zip(index["shards"], index["inputs"], strict=True)
        wanted = [(shard, r) for shard, r in pairs if r["split"] == self.wanted_split]
        records = [record for _, record in wanted]
        gone = dropped_rows(self._store, self._group, records, self.dropped, self.command)
        readers = []
        self.inputs = []
        for shard, record in wanted:
            reader = MappedReader.from_json(self.local, "", shard)
            reader.leave_out(gone.get(record["shard"], []))
            if reader.samples:
                readers.append(reader)
                self.inputs.append(record["shard"])
        return readers


class MappedReader(MDSReader):
    """Maps its file; the library opens it for every sample, which takes longer than reading."""

    skips: Sequence[int] = ()

    def leave_out(self, rows: list[int]) -> None:
        """These rows, in ascending order, do not exist for the dataset."""
        self.samples -= len(rows)
        # How many kept rows come before each. Kept row number i is row i plus the dropped ones
        # before it: those that have no more than i kept rows before them.
        self.skips = [row - number for number, row in enumerate(rows)]

    def get_sample_data(self, idx: int) -> bytes:
        """A sample's bytes. Raises FileNotFoundError where the shard was not fetched yet."""
        data = _mapped(os.path.join(self.dirname, self.raw_data.basename))
        idx += bisect.bisect_right(self.skips, idx)
        begin, end = np.frombuffer(data, np.uint32, 2, offset=(1 + idx) * 4)
        return data[begin:end]


@functools.lru_cache(OPEN_SHARDS)
def _mapped(path: str) -> mmap.mmap:
    # A shard's name holds its fingerprint: what was mapped once under a name stays right.
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class LatentText(StreamingDataset):
    """Streams `Sample`s of one or more sources, in proportion to their sizes.

    Args:
        streams: one a source, each with a sample or more.
        vae: facts of the VAE that made all of them.
        batch_size: samples of this rank in a batch.
        seed: decides the order.
        shuffle: False streams in the shards' order.
    """

    def __init__(
        self,
        streams: list[SplitStream],
        vae: VaeFacts,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        super().__init__(streams=streams, batch_size=batch_size, shuffle=shuffle, shuffle_seed=seed)
        self._vae = vae

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Goes on in the middle of an epoch, which ends earlier where samples were dropped since.

        What is left of such an epoch is in another order, so a sample may come twice in it.
        """
        super().load_state_dict({**obj, "sample_in_epoch": min(obj["sample_in_epoch"], self.size)})

    def get_item(self, sample_id: int, retry: int = 7) -> Sample:
        """One sample by its place in the dataset.

        Raises:
            SettingError: the picture has no caption in its text group.
        """
        stored: dict[str, Any] = super().get_item(sample_id, retry)
        shard, _ = self.spanner[sample_id]
        number = self.stream_per_shard[shard]
        stream = self.streams[number]
        assert isinstance(stream, SplitStream)
        name = stream.inputs[shard - self.shard_offset_per_stream[number]]
        caption = stream.text.read(name, stored["key"])
        return Sample(
            key=stored["key"],
            caption=caption.text,
            latent=to_model(stored["latent"].astype(np.float32), self._vae).astype(np.float32),
            tokens=caption.tokens,
        )


def make_dataset(plan: Plan, stage: str, shuffle: bool = True) -> LatentText:
    """The dataset of one stage of a run; its order is a function of (seed, stage)."""
    config = plan.config
    store = Store(config.data.root)
    cache = Path(config.data.cache or config.run_folder() / "cache").absolute()
    # A list that is written just now must count on every rank or on none: all would deal the
    # samples differently.
    dropped = _of_first_rank({s.name: drops.read(store, s.name) for s in plan.data[stage]})
    streams = [
        SplitStream(
            source,
            store,
            config.data.split,
            cache,
            TextGroup(store, source.text_group, cache, source.command(config)),
            dropped[source.name],
            source.command(config),
        )
        for source in plan.data[stage]
    ]
    batch_size = config.stages[stage].batch_size // world_size()
    seed = keyed_seed(config.seed, "order", stage) % (1 << 31)
    return LatentText(streams, plan.vae, batch_size, seed, shuffle)


def _of_first_rank(value: T) -> T:
    """The first rank's value, on every rank."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def make_loader(dataset: LatentText, workers: int, trimmed: bool) -> StreamingDataLoader:
    """Batches of `collate`, all full: what is left over at the end of an epoch is left out."""
    return StreamingDataLoader(
        dataset,
        batch_size=dataset.batch_size,
        collate_fn=functools.partial(collate, trimmed=trimmed),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


def collate(samples: list[Sample], trimmed: bool) -> dict[str, torch.Tensor]:
    """Samples -> the tensors of a batch.

    Returns:
        latents float32 (B, C, h, w); y float16 (B, L, W), padded with zero rows to the longest
        caption; y_mask bool (B, L), True for real rows, in a trimmed batch only; index int64 (B,),
        the places in this rank's batch, which micro-batches need to find their random numbers.
    """
    lengths = [len(sample["tokens"]) for sample in samples]
    first = samples[0]["tokens"]
    y = np.zeros((len(samples), max(lengths), first.shape[1]), first.dtype)
    for row, sample, length in zip(y, samples, lengths, strict=True):
        row[:length] = sample["tokens"]
    batch = {
        "latents": torch.from_numpy(np.stack([sample["latent"] for sample in samples])),
        "y": torch.from_numpy(y),
        "index": torch.arange(len(samples)),
    }
    if trimmed:
        batch["y_mask"] = torch.arange(y.shape[1]) < torch.tensor(lengths)[:, None]
    return batch


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

"""The loader: which samples, in which order, joined with which captions, in which batches."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from streaming import LocalDataset
from streaming.base.batching import generate_work
from streaming.base.partition import get_partitions
from streaming.base.world import World

from pipeline.core import layout
from pipeline.core.errors import SettingError
from pipeline.core.latents import to_model
from pipeline.core.manifest import VaeFacts
from tests.training.helpers.groups import Encoders, make_source, open_text, settings
from training import scores
from training.config.load import resolve
from training.config.plan import TrainingPlan
from training.data import shard_files, token_vectors
from training.data.buffers import Pool
from training.data.loader import LatentText, Sample, collate, global_rows, make_dataset, make_loader
from training.data.mapped import Maps
from training.data.token_vectors import TextGroup
from training.randomness import Rows
from training.run.preflight import check


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, encoders: Encoders) -> Path:
    """Sources toy and more; shard 00002 of each is held out."""
    folder = tmp_path_factory.mktemp("root")
    make_source(folder, encoders)
    make_source(folder, encoders, name="more", samples=11, seed=1)
    make_source(folder, encoders, name="full", text="full")
    return folder


def plan_of(root: Path, encoders: Encoders, **data: Any) -> TrainingPlan:
    raw = settings(root, encoders, root / "run")
    return check(resolve({**raw, "data": raw["data"] | data}))


def all_samples(dataset: LatentText) -> list[Sample]:
    return [dataset[i] for i in range(dataset.size)]


def test_streams_the_split_and_nothing_else(root: Path, encoders: Encoders) -> None:
    dataset = make_dataset(plan_of(root, encoders), "masked")
    expected = {f"{shard:05d}{i:04d}" for shard in (0, 1) for i in range(20)}
    assert {sample["key"] for sample in all_samples(dataset)} == expected
    assert {sample["key"] for sample in dataset} == expected  # streamed, shuffled
    heldout = make_dataset(plan_of(root, encoders, split="heldout"), "masked")
    assert {sample["key"] for sample in all_samples(heldout)} == {
        f"00002{i:04d}" for i in range(20)
    }


def test_compressed_groups_are_unpacked_in_the_cache(
    root: Path, encoders: Encoders, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    make_source(packed, encoders, compression="zstd")
    before = {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}
    expected = all_samples(make_dataset(plan_of(root, encoders), "masked"))
    found = list(make_dataset(plan_of(packed, encoders), "masked"))
    found = sorted(found, key=lambda sample: sample["key"])
    for one, other in zip(found, expected, strict=True):
        assert (one["key"], one["caption"]) == (other["key"], other["caption"])
        np.testing.assert_array_equal(one["latent"], other["latent"])
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
    assert {path: path.read_bytes() for path in before} == before
    assert not list(packed.glob("toy/**/*.mds"))


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_hold_every_sample_once(root: Path, encoders: Encoders, workers: int) -> None:
    dataset = make_dataset(plan_of(root, encoders), "masked")
    loader = make_loader(dataset, workers, trimmed=True)
    epochs = []
    for _ in range(2):
        batches = [batch["latents"][:, 0, 0, 0] for batch in loader]
        assert [len(batch) for batch in batches] == [8] * 5
        epochs.append(torch.cat(batches).tolist())
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]  # another order
    assert len(set(epochs[0])) == 20  # numbers 0..19, in both shards


def test_order_is_a_function_of_seed_and_stage(root: Path, encoders: Encoders) -> None:
    def order(stage: str, seed: int) -> list[str]:
        raw = settings(root, encoders, root / "run")
        plan = check(resolve({**raw, "seed": seed}))
        return [sample["key"] for sample in make_dataset(plan, stage)]

    assert order("masked", 3) == order("masked", 3)
    assert order("masked", 3) != order("masked", 4)
    assert order("masked", 3) != order("full", 3)


def test_join_is_by_key(root: Path, encoders: Encoders) -> None:
    plan = plan_of(root, encoders, sources=["more", "toy"])
    samples = all_samples(make_dataset(plan, "masked"))
    assert len(samples) == 2 * 11 + 2 * 20
    # What LocalDataset, the library's own reader, says of both groups, whose keys are the same.
    more, toy = (
        {
            stored["key"]: stored["latent"]
            for stored in LocalDataset(str(root / source.latents_group))
        }
        for source in plan.data["masked"]
    )
    for sample in samples:
        shard, number = sample["key"][:5], int(sample["key"][5:])
        assert sample["caption"] == f"caption {number % 7} of {shard}"
        assert sample["tokens"].shape == (3 + number % 7, 16)
        assert (sample["tokens"][:, 0] == number % 7).all()
        assert sample["tokens"].dtype == np.float16
    for place, sample in enumerate(samples):
        raw = (more if place < 22 else toy)[sample["key"]]
        np.testing.assert_array_equal(sample["latent"], raw)
        found = batch_of([sample], plan.vae)["latents"][0].numpy()
        raw = raw.astype(np.float32)
        np.testing.assert_array_equal(found, to_model(raw, plan.vae))
        np.testing.assert_allclose(found, (raw - 0.25) * 0.5, rtol=1e-6)


def text_group(
    root: Path, encoders: Encoders, name: str = "toy", mode: str = "trimmed"
) -> TextGroup:
    return open_text(root, layout.text_group(name, encoders.text, "alt", mode))


def test_text_equals_the_librarys_reader(root: Path, encoders: Encoders) -> None:
    for name, mode in (("toy", "trimmed"), ("full", "full")):
        group = text_group(root, encoders, name, mode)
        captions = LocalDataset(str(root / layout.text_group(name, encoders.text, "alt", mode)))
        for place in range(len(captions)):
            stored = captions[place]
            shard, c = f"{place // 7:05d}", place % 7
            found = group.read(shard, f"{shard}{c:04d}")
            assert found.text == stored["caption"]
            np.testing.assert_array_equal(found.tokens, stored["tokens"])


def test_open_text_shards_are_bounded(
    root: Path, encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_vectors, "OPEN_SHARDS", 1)
    maps = Maps(1)
    monkeypatch.setattr(shard_files, "_maps", maps)
    group = text_group(root, encoders)
    for _ in range(2):
        for shard in ("00000", "00001"):
            assert group.read(shard, f"{shard}0003").text == f"caption 3 of {shard}"
    assert group._open.cache_info().currsize == len(maps) == 1
    again = pickle.loads(pickle.dumps(group))
    assert again.read("00000", "000000000").text == "caption 0 of 00000"


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_picture_without_caption(tmp_path: Path, encoders: Encoders, workers: int) -> None:
    make_source(tmp_path, encoders, without_caption=("000010004",))
    dataset = make_dataset(plan_of(tmp_path, encoders), "masked")
    with pytest.raises(
        SettingError, match="picture 000010004 has a latent but no caption"
    ) as error:
        list(make_loader(dataset, workers, trimmed=True))
    assert "run `pipeline run encode --source toy" in str(error.value)


VAE = VaeFacts(name="v", repo="v", channels=4, downsample=8, scale=0.5, shift=0.25)


def batch_of(
    samples: list[Sample], vae: VaeFacts = VAE, trimmed: bool = True
) -> dict[str, torch.Tensor]:
    return collate(samples, vae, trimmed, (Pool(0, 0, 0), Pool(0, 0, 0)))


def sample(length: int, value: float) -> Sample:
    return Sample(
        key="k",
        caption="c",
        latent=np.full((4, 8, 8), value, np.float16),
        tokens=np.full((length, 16), value, np.float16),
        drop=value / 4,
    )


def test_batches_are_padded_to_the_longest() -> None:
    batch = batch_of([sample(3, 1), sample(5, 2)])
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "latents": ((2, 4, 8, 8), torch.float32),
        "y": ((2, 5, 16), torch.float16),
        "y_mask": ((2, 5), torch.bool),
        "drop": ((2,), torch.float32),
        "index": ((2,), torch.int64),
    }
    assert batch["y_mask"].sum(dim=1).tolist() == [3, 5]
    assert batch["y"][0, :3].unique().tolist() == [1]
    assert not batch["y"][0, 3:].any()


def test_full_batches_have_no_mask() -> None:
    batch = batch_of([sample(12, 1), sample(12, 2)], trimmed=False)
    assert batch.keys() == {"latents", "y", "drop", "index"}


@pytest.mark.parametrize(
    ("nodes", "ranks", "node", "rank"), [(1, 2, 0, 1), (2, 2, 1, 0), (2, 2, 1, 1)]
)
def test_ranks_take_known_rows_of_the_global_batch(
    monkeypatch: pytest.MonkeyPatch, nodes: int, ranks: int, node: int, rank: int
) -> None:
    """The rows that a rank's random numbers are drawn for are those that its loader gives."""
    for name, value in {
        "WORLD_SIZE": nodes * ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "LOCAL_RANK": rank,
        "NODE_RANK": node,
    }.items():
        monkeypatch.setenv(name, str(value))
    batch = 16
    alone = get_partitions("relaxed", 64, nodes, 1, 1, 1, batch)[0, 0, 0]
    mine = get_partitions("relaxed", 64, nodes, nodes, ranks, 1, batch // (nodes * ranks))
    rows = global_rows()
    assert rows == Rows(first=rank * nodes + node, step=nodes * ranks)
    everyone = np.full((64 // batch, batch), -1)
    for n in range(nodes):
        for r in range(ranks):
            everyone[:, r * nodes + n :: nodes * ranks] = mine[n, r, 0]
    np.testing.assert_array_equal(everyone, alone)
    np.testing.assert_array_equal(everyone[:, rows.first :: rows.step], mine[node, rank, 0])
    assert sorted(everyone.ravel()) == list(range(64))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    ("nodes", "ranks"), [(1, 1), (1, 2), (1, 7), (1, 8), (2, 4), (2, 7), (4, 2), (8, 1)]
)
def test_no_sample_is_repeated_to_pad_ranks(
    sizes: LatentText, nodes: int, ranks: int, workers: int
) -> None:
    """Epochs of 1,003 samples; a global batch is four samples a rank."""

    def epoch(number: int, seen: int = 0) -> np.ndarray:
        """(batches, samples) in the order of training, as far as the loader gives them."""
        world = World(nodes, ranks, max(workers, 1), 0)
        ids = generate_work("random", sizes, world, number, seen)
        # (nodes, ranks, workers, batches, samples) -> each worker's batches come in turn
        ids = ids.transpose(3, 2, 0, 1, 4).reshape(-1, nodes * ranks * 4)
        return ids[(ids >= 0).all(axis=1)]

    world = nodes * ranks
    sizes.batch_size, sizes.num_canonical_nodes = 4, nodes
    sizes.epoch_size = 1003 - 1003 % (4 * world)  # what LatentText makes of it; tested below
    epochs = [epoch(number) for number in range(2)]
    for ids in epochs:
        assert len(ids) == 1003 // (4 * world)
        assert len(np.unique(ids)) == ids.size  # none comes twice
    assert set(epochs[0].ravel()) != set(epochs[1].ravel())
    for batches in (1, 3, len(epochs[0])):
        np.testing.assert_array_equal(epoch(0, batches * 4 * world), epochs[0][batches:])


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory, encoders: Encoders) -> LatentText:
    """1,003 samples."""
    folder = tmp_path_factory.mktemp("sizes")
    make_source(folder, encoders, samples=1003, splits=("train",))
    dataset = make_dataset(plan_of(folder, encoders), "masked")
    assert (dataset.size, dataset.epoch_size, len(dataset)) == (1003, 1000, 1000)
    dataset.shuffle_block_size = 1 << 18
    return dataset


def test_the_order_does_not_depend_on_nodes(root: Path, encoders: Encoders) -> None:
    dataset = make_dataset(plan_of(root, encoders), "masked")
    assert dataset.num_canonical_nodes == 1
    dataset.batch_size, dataset.shuffle_block_size = 2, 1 << 18
    assert dataset.epoch_size % 8 == 0
    orders = []
    for nodes, ranks in ((1, 4), (2, 2), (4, 1)):
        ids = generate_work("random", dataset, World(nodes, ranks, 1, 0), 0, 0)
        # (nodes, ranks, workers, batches, samples of a rank) -> the global batches
        orders.append([set(batch.ravel()) for batch in np.moveaxis(ids, 3, 0)])
    assert orders[0] == orders[1] == orders[2]


def test_the_library_alone_repeats_samples(sizes: LatentText) -> None:
    """Why an epoch ends with a whole global batch."""
    sizes.batch_size, sizes.num_canonical_nodes, sizes.epoch_size = 2, 1, 1003
    ids = generate_work("random", sizes, World(1, 8, 1, 0), 0, 0)
    assert (ids >= 0).all()
    assert ids.size - len(np.unique(ids)) == 5


WEIGHTS = {"toy": 3.0, "more": 1.0}  # of 40 and 22 samples


def sources_of(dataset: LatentText) -> list[tuple[str, str]]:
    """(source, key) of an epoch's samples; toy's first latent value is its key's number, and so is
    more's, so captions are no help: places are."""
    ids = generate_work("random", dataset, World(1, 1, 1, 0), dataset.next_epoch, 0).ravel()
    dataset.next_epoch += 1
    numbers = [dataset.stream_per_shard[dataset.spanner[i][0]] for i in ids]
    streams: Any = dataset.streams
    return [
        (streams[n].source.name, dataset[int(i)]["key"]) for n, i in zip(numbers, ids, strict=True)
    ]


def test_weights_are_shares_of_an_epoch(root: Path, encoders: Encoders) -> None:
    plan = plan_of(root, encoders, sources=WEIGHTS)
    assert plan.shares("masked") == [0.75, 0.25]
    dataset = make_dataset(plan, "masked")
    assert dataset.epoch_size == 56  # of 62, in batches of 8
    dataset.num_canonical_nodes, dataset.shuffle_block_size = 1, 1 << 18
    seen: dict[str, set[str]] = {"toy": set(), "more": set()}
    for _ in range(12):
        samples = sources_of(dataset)
        toy = [key for name, key in samples if name == "toy"]
        more = [key for name, key in samples if name == "more"]
        assert len(toy) + len(more) == 56
        assert abs(len(toy) - 42) <= 6  # 46.5 of 62, before the last 6 are left out
        assert max(toy.count(key) for key in toy) <= 2  # 46 of 40: at most once more
        assert len(set(more)) == len(more)  # 15 of 22: none twice
        seen["toy"] |= {*toy}
        seen["more"] |= {*more}
    assert {name: len(keys) for name, keys in seen.items()} == {"toy": 40, "more": 22}


def test_weights_of_a_stage_and_resume(root: Path, encoders: Encoders) -> None:
    raw = settings(root, encoders, root / "run")
    raw["stages"]["full"]["sources"] = WEIGHTS
    plan = check(resolve(raw))
    assert (plan.shares("masked"), plan.shares("full")) == ([1], [0.75, 0.25])
    expected = list(make_loader(make_dataset(plan, "full"), 0, trimmed=True))
    loader = make_loader(make_dataset(plan, "full"), 0, trimmed=True)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    resumed = make_loader(make_dataset(plan, "full"), 0, trimmed=True)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for one, other in zip(expected[3:], resumed, strict=True):
        assert torch.equal(one["latents"], other["latents"])


def batches_of(
    plan: TrainingPlan, workers: int, skip: int = 0, stage: str = "masked"
) -> list[dict[str, torch.Tensor]]:
    """The batches of two epochs; the first `skip` by a loader that another one goes on from."""
    loader = make_loader(make_dataset(plan, stage), workers, trimmed=True)
    batches: list[dict[str, torch.Tensor]] = []
    if skip:
        batches = list(itertools.islice(itertools.chain(loader, loader), skip))
        state = json.loads(json.dumps(loader.state_dict()))
        loader = make_loader(make_dataset(plan, stage), workers, trimmed=True)
        loader.load_state_dict(state)
    return batches + [batch for _ in range(2 - skip // 5) for batch in loader]


def equal(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> None:
    assert len(one) == len(other) == 10
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert torch.equal(value, b[name]), name


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory, encoders: Encoders) -> TrainingPlan:
    folder = tmp_path_factory.mktemp("moments")
    make_source(folder, encoders, latents="moments", crop="random")
    plan = plan_of(folder, encoders, latents="moments", crop="random")
    assert plan.data["masked"][0].latents_group.endswith("/64.moments.random")
    return plan


def test_moments_are_drawn_anew_each_epoch(moments: TrainingPlan) -> None:
    """And are the same with any number of workers, and for a run that was resumed."""
    dataset = make_dataset(moments, "masked")
    one, again = dataset[4]["latent"], dataset[4]["latent"]
    np.testing.assert_array_equal(one, again)
    dataset._epoch = 1
    assert (dataset[4]["latent"] != one).all()
    assert one.shape == (4, 8, 8)
    noise = []
    for dataset._epoch in range(200):
        sample = dataset[4]
        noise.append(sample["latent"])
    mean, std = np.mean(noise, axis=0), np.std(noise, axis=0)
    assert mean[0, 0, 0] == pytest.approx(4, abs=0.15)  # its number
    assert std.mean() == pytest.approx(np.exp(-1), rel=0.02)  # log variance -2
    batches = batches_of(moments, 0)
    assert batches[0]["latents"].shape == (8, 4, 8, 8)
    equal(batches, batches_of(moments, 2))
    equal(batches, batches_of(moments, 2, skip=3))
    equal(batches, batches_of(moments, 0, skip=6))
    other = batches_of(moments, 0, stage="full")
    assert not torch.equal(other[0]["latents"], batches[0]["latents"])


def test_scores_read_the_mean_of_moments(
    moments: TrainingPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards: dict[str, dict[str, np.ndarray]] = {}

    def join(store: Any, images: str, shard: str, stored: dict[str, Any], crop: Any) -> list[str]:
        shards[shard] = stored
        return [*stored]

    monkeypatch.setattr(scores, "_join", join)
    config = moments.config.model_dump(mode="json")
    for sources in (["toy"], {"toy": 2.0}):
        config["data"]["sources"] = sources
        metadata = SimpleNamespace(config=config, vae=moments.vae, resolution=64)
        assert {name: len(found) for name, found in scores.read_examples(metadata).items()} == {
            "train": 40,
            "heldout": 20,
        }
        latent = shards["00001"]["000010007"]
        assert latent.shape == (4, 8, 8)
        assert latent[0, 0, 0] == 7


def test_captions_are_dropped_by_sample_and_epoch(root: Path, encoders: Encoders) -> None:
    """Independently in each epoch, and the same in whatever batch and rank a sample comes."""
    plan = plan_of(root, encoders, sources=["toy", "more"])
    raw = settings(root, encoders, root / "run")
    raw["defaults"]["batch_size"] = 2
    raw["data"]["sources"] = ["more", "toy"]
    other = check(resolve(raw))

    def drops_of(plan: TrainingPlan, epoch: int) -> dict[tuple[str, str], float]:
        dataset = make_dataset(plan, "masked")
        dataset._epoch = epoch
        sources = [stream.source.name for stream in dataset.streams]  # pyright: ignore
        places = [dataset.stream_per_shard[dataset.spanner[i][0]] for i in range(dataset.size)]
        return {
            (sources[place], dataset[i]["key"]): dataset[i]["drop"]
            for i, place in enumerate(places)
        }

    first, second = drops_of(plan, 0), drops_of(plan, 1)
    assert len(first) == len({*first.values()}) == 62  # sources have keys in common
    assert first == drops_of(other, 0)
    assert first.keys() == second.keys()
    assert not {*first.values()} & {*second.values()}
    values = [value for epoch in range(40) for value in drops_of(plan, epoch).values()]
    assert np.mean(np.array(values) < 0.1) == pytest.approx(0.1, abs=0.02)
    equal(batches_of(plan_of(root, encoders), 0), batches_of(plan_of(root, encoders), 2, skip=7))


def test_buffers_are_lent_and_given_back(root: Path, encoders: Encoders) -> None:
    """Batches that are kept stay what they were; more than there are buffers may be kept."""
    plan = plan_of(root, encoders)
    expected = batches_of(plan, 0)
    loader = make_loader(make_dataset(plan, "masked"), 1, trimmed=True)
    pools = loader.collate_fn.keywords["pools"]  # pyright: ignore
    kept = [batch for _ in range(2) for batch in loader]
    equal(kept, expected)
    assert [pool._lent.sum() for pool in pools] == [5, 5]
    part = kept[0]["y"][2:4]  # a view keeps its buffer
    del kept
    assert [pool._lent.sum() for pool in pools] == [0, 1]
    for batch in loader:
        assert len(batch["y"]) == 8
    assert torch.equal(part, expected[0]["y"][2:4])
    del part, batch
    assert [pool._lent.sum() for pool in pools] == [0, 0]


def test_resumes_in_the_middle_of_an_epoch(root: Path, encoders: Encoders) -> None:
    plan = plan_of(root, encoders)
    loader = make_loader(make_dataset(plan, "masked"), 0, trimmed=True)
    batches = [batch for _ in range(2) for batch in loader]
    loader = make_loader(make_dataset(plan, "masked"), 0, trimmed=True)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make_loader(make_dataset(plan, "masked"), 0, trimmed=True)
    resumed.load_state_dict(state)
    rest = [batch for _ in range(2) for batch in resumed]
    assert len(rest) == 7
    for expected, found in zip(batches[3:], rest, strict=True):
        assert torch.equal(expected["latents"], found["latents"])
        assert torch.equal(expected["y"], found["y"])

"""Encode's choices and its care: posterior, crops, int8, retries, threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.catalog import Catalog
from pipeline.core.commits import read_commits
from pipeline.core.errors import SettingError, TooManyRejects
from pipeline.core.images import fit, read_pixels
from pipeline.core.latents import posterior_sample
from pipeline.core.manifest import LatentsManifest, TextManifest, read_manifest
from pipeline.core.mends import MENDS
from pipeline.core.samples import ImageRef, ImageSample, InputShard
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.core.tokens import dequantise
from pipeline.encoders import load_text, load_vae
from pipeline.engine.plan import plan
from pipeline.stages.encode import Encode
from pipeline.stages.encode_settings import EncodeSettings
from pipeline.stages.encode_worker import EncodeWorker
from pipeline.stages.images import read_images, write_images
from tests.pipeline.helpers.roots import SETTINGS, mds_rows, run_here, tree
from tests.pipeline.helpers.roots import pictures as pictures_of

IMAGES = "openmoji/images"
BASE: dict[str, Any] = {
    "vae": "tiny4",
    "text_encoder": "tiny-clip",
    "resolutions": (64,),
    "text": "trimmed",
    "batch_size": 4,
}


def stage(**changes: Any) -> Encode:
    rate = changes.pop("max_reject_rate", 0.9)
    return Encode("openmoji", EncodeSettings(**(BASE | changes)), rate)


def latents(store: Store, **changes: Any) -> dict[str, np.ndarray]:
    made = stage(**changes)
    run_here(made, store)
    return {row["key"]: row["latent"] for row in mds_rows(store, made.latents_group(64))}


def moments(store: Store, shard: str = "00000") -> dict[str, np.ndarray]:
    """Straight from diffusers, in one batch, in float32."""
    vae = load_vae("tiny4").vae
    torch.set_num_threads(1)
    images = list(read_images(store, IMAGES, read_commits(store, IMAGES)[shard]))
    pixels = np.stack([fit(read_pixels(image.data), 64) for image in images])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        found = vae.encode(x).latent_dist.parameters.numpy()
    return {image.key: one for image, one in zip(images, found, strict=True)}


def test_moments_are_diffusers_own_to_the_bit(downloaded):
    stored = latents(downloaded, latents="moments", batch_size=16)
    for key, expected in moments(downloaded).items():
        np.testing.assert_array_equal(stored[key], expected.astype(np.float16))
    manifest = read_manifest(downloaded, "openmoji/latents/tiny4/64.moments")
    assert isinstance(manifest, LatentsManifest)
    assert (manifest.latents, manifest.vae.channels) == ("moments", 4)


def test_a_sample_is_a_function_of_seed_and_key(downloaded):
    stored = latents(downloaded, latents="sample", seed=3, batch_size=16)
    for key, expected in moments(downloaded).items():
        drawn = posterior_sample(expected, 3, key).astype(np.float16)
        np.testing.assert_array_equal(stored[key], drawn)
    other = latents(Store(downloaded.root), latents="mean", batch_size=16)
    assert all((stored[key] != other[key]).any() for key in other)


def test_posterior_samples_have_the_posteriors_moments():
    found = np.stack([np.full((1, 8, 8), 2.0), np.full((1, 8, 8), np.log(0.25))])
    draws = np.stack(
        [posterior_sample(found.reshape(2, 8, 8), 0, "k", epoch) for epoch in range(500)]
    )
    assert draws.mean() == pytest.approx(2, abs=0.02)
    assert draws.std() == pytest.approx(0.5, abs=0.01)
    assert posterior_sample(np.full((2, 1, 1), np.float32(1e6)), 0).max() < 1e6 + 1e6


def test_latents_do_not_depend_on_batch_or_neighbours(downloaded):
    by_size = [latents(downloaded, batch_size=16, latents="mean")]
    for size in (1, 3):
        root = Path(downloaded.root)
        for path in root.glob("openmoji/latents/**/commits/*.json"):
            path.unlink()
        by_size.append(latents(downloaded, batch_size=size))
    largest = max(np.abs(latent).max() for latent in by_size[0].values())
    for other in by_size[1:]:
        for key, latent in by_size[0].items():
            # float16 rounds a difference of 1e-5 of the largest value up to its own last place.
            difference = np.abs(latent.astype(np.float32) - other[key].astype(np.float32)).max()
            assert difference <= 1e-5 * largest + np.spacing(np.float16(largest))


def test_what_is_stored_decodes_as_the_models_own(downloaded):
    vae = load_vae("tiny4")
    stored = latents(downloaded, batch_size=16)
    for key, found in list(moments(downloaded).items())[:3]:
        own = vae.decode(torch.from_numpy(found[None, :4]))
        through = vae.decode(torch.from_numpy(stored[key][None].astype(np.float32)))
        assert np.abs(own.astype(int) - through.astype(int)).max() <= 1


@pytest.mark.parametrize("crop", ["center", "random"])
def test_crops_have_groups_of_their_own_and_depend_on_the_key_alone(tmp_path, crop):
    store = Store(tmp_path)
    write(store, [wide(f"00000000{i}") for i in range(3)])
    made = latents(store, crop=crop, captions="alt", batch_size=1)
    group = stage(crop=crop).latents_group(64)
    assert group.endswith("64" if crop == "center" else "64.random")
    same = len({made[key].tobytes() for key in made})
    assert same == (1 if crop == "center" else 3)  # three equal pictures


def test_pictures_below_the_resolution(tmp_path):
    store = Store(tmp_path)
    small = SETTINGS.model_copy(update={"size": 40})
    pictures = pictures_of(small)
    write(store, pictures)
    with pytest.raises(TooManyRejects, match=r"too-small; e.g. .*: 40 pixels on the shorter side"):
        run_here(stage(captions="alt"), store)
    made = latents(store, captions="alt", small="upscale")
    assert len(made) == len(pictures)
    manifest = read_manifest(store, "openmoji/latents/tiny4/64")
    assert isinstance(manifest, LatentsManifest)
    assert manifest.small == "upscale"
    other = Store(tmp_path / "other")
    write(other, [wide("000000000")])
    with pytest.raises(TooManyRejects, match="not-square"):
        run_here(stage(captions="alt", crop="none"), other)


def test_int8_text_is_the_float16_text_to_a_cosine_of_0_9995(downloaded):
    run_here(stage(captions="alt"), downloaded)
    run_here(stage(captions="alt", text_dtype="int8"), downloaded)
    plain = mds_rows(downloaded, "openmoji/text/tiny-clip/alt.trimmed")
    packed = mds_rows(downloaded, "openmoji/text/tiny-clip/alt.trimmed.int8")
    manifest = read_manifest(downloaded, "openmoji/text/tiny-clip/alt.trimmed.int8")
    assert isinstance(manifest, TextManifest)
    assert manifest.dtype == "int8"
    for one, other in zip(plain, packed, strict=True):
        assert one["caption"] == other["caption"]
        a = one["tokens"].astype(np.float64)
        b = dequantise(other["tokens"], other["scales"]).astype(np.float64)
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() >= 0.9995


def test_captions_of_any_kind(tmp_path):
    store = Store(tmp_path)
    texts = ["", "   ", "猫が青い背景に", "🍕" * 50, "word " * 2000, "a plain one"]
    write(store, [wide(f"00000000{i}", text) for i, text in enumerate(texts)])
    run_here(stage(captions="alt", max_reject_rate=1.0), store)
    group = "openmoji/text/tiny-clip/alt.trimmed"
    (commit,) = read_commits(store, group).values()
    assert commit.rejects == {"no-caption": 2}
    assert commit.samples == 4
    rows = {row["caption"]: row["tokens"] for row in mds_rows(store, group)}
    text = load_text("tiny-clip")
    assert len(rows[("word " * 2000).strip()]) == text.facts.length
    assert commit.counters["captions_at_full_length"] >= 1
    assert len(rows["a plain one"]) < text.facts.length
    keys = from_parquet(store.read(f"{group}/{commit.file('.parquet')}"))
    assert keys["key"].to_pylist() == [f"00000000{i}" for i in (2, 3, 4, 5)]


class Wrapped:
    """The real VAE behind a fault."""

    def __init__(self, fault: Callable[[np.ndarray, bool], torch.Tensor | None]) -> None:
        self.vae = load_vae("tiny4")
        self.fault = fault

    def moments(self, pixels: np.ndarray, exact: bool = False) -> torch.Tensor:
        found = self.fault(pixels, exact)
        return self.vae.moments(pixels, exact) if found is None else found


def encode_with(store: Store, fault: Callable[[np.ndarray, bool], torch.Tensor | None]) -> None:
    made = stage(captions="alt")
    worker = EncodeWorker(made, store)
    worker.vae = Wrapped(fault)
    catalog = Catalog(store)
    for job in plan(made, catalog).jobs(made, catalog):
        worker(job)
    run_here(made, store)  # publishes


def test_a_latent_that_is_not_finite_is_tried_again_in_float32(downloaded):
    def overflows(pixels: np.ndarray, exact: bool) -> torch.Tensor | None:
        return None if exact else torch.full((len(pixels), 8, 8, 8), float("inf"))

    encode_with(downloaded, overflows)
    for commit in read_commits(downloaded, "openmoji/latents/tiny4/64").values():
        assert commit.rejects == {}
        assert commit.counters == {"retried in float32": commit.samples, "mends": MENDS}


def test_one_that_is_never_finite_is_a_reject(downloaded):
    broken = read_pixels(next(iter_images(downloaded)).data)

    def fails(pixels: np.ndarray, exact: bool) -> torch.Tensor | None:
        found = Wrapped(lambda *_: None).moments(pixels, exact)
        for number, picture in enumerate(pixels):
            if np.array_equal(picture, fit(broken, 64)):
                found[number, 0, 3, 3] = float("nan")
        return found

    encode_with(downloaded, fails)
    first, *_ = read_commits(downloaded, "openmoji/latents/tiny4/64").values()
    assert first.rejects == {"non-finite": 1}


def test_out_of_memory_goes_on_in_halves_and_flags_the_shard(downloaded):
    def small(pixels: np.ndarray, exact: bool) -> torch.Tensor | None:
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return None

    encode_with(downloaded, small)
    rows = mds_rows(downloaded, "openmoji/latents/tiny4/64")
    expected = moments(downloaded)
    first, last = read_commits(downloaded, "openmoji/latents/tiny4/64").values()
    assert first.counters["split, out of memory"] >= 1
    assert last.counters == {"mends": MENDS}  # it has one picture
    for row in rows:
        if row["key"] in expected:
            mean = expected[row["key"]][:4]
            assert np.abs(row["latent"] - mean).max() < 2e-3 * np.abs(mean).max()


def test_any_other_error_stops_the_shard_and_not_a_batch(downloaded):
    def fails(pixels: np.ndarray, exact: bool) -> torch.Tensor | None:
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        encode_with(downloaded, fails)
    assert read_commits(downloaded, "openmoji/latents/tiny4/64") == {}


def test_threads_and_two_shards_in_hand_give_the_same_bytes(downloaded, tmp_path):
    other = Store(tmp_path / "other")
    for path, data in tree(Path(downloaded.root)).items():
        other.write(path, data)
    made = stage(captions="alt", batch_size=2)
    run_here(made, downloaded)
    worker = EncodeWorker(made, other, threads=3)
    catalog = Catalog(other)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(worker, plan(made, catalog).jobs(made, catalog)))
    run_here(made, other)  # publishes
    assert tree(Path(other.root)) == tree(Path(downloaded.root))
    spent = worker.take_counters()
    assert {"ms read", "ms decode", "ms resize", "ms vae", "ms text", "ms write"} <= set(spent)
    assert spent["loaded vae tiny4"] == spent["loaded text encoder tiny-clip"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": "mode"}, "latents=mode: use one of mean, sample, moments"),
        ({"crop": "smart"}, "crop=smart: use one of center, random, none"),
        ({"text_dtype": "int4"}, "text_dtype=int4: use one of float16, int8"),
        ({"dtype": "float64"}, "dtype=float64: use one of auto"),
        ({"device": "tpu"}, "device=tpu: use one of cpu, cuda"),
        ({"batch_size": 0}, "batch_size=0: use 1 or more, or auto"),
        ({"compression": "gz"}, "stamps the time"),
    ],
)
def test_settings_that_do_not_exist(changes, message):
    with pytest.raises(SettingError, match=message):
        stage(**changes)


def test_auto_batches_are_settled_before_the_fingerprint():
    settings = stage(batch_size="auto").settings
    assert (settings.batch(64), settings.batch()) == (16, 16)
    gpu = stage(batch_size="auto", device="cuda").settings
    assert [gpu.batch(r) for r in (256, 512, 1024)] == [128, 32, 8]
    assert gpu.compute_dtype() == "bfloat16"
    assert stage(device="cuda").needs.gpus == 1


def iter_images(store: Store):
    return read_images(store, IMAGES, read_commits(store, IMAGES)["00000"])


def write(store: Store, pictures: list[ImageSample]) -> None:
    write_images(store, IMAGES, InputShard("00000", "train"), {}, pictures, 0.0)


def wide(key: str, caption: str = "stripes") -> ImageSample:
    """A picture of 160 x 64 whose every column differs."""
    import io

    from PIL import Image

    ramp = np.linspace(0, 255, 160, dtype=np.uint8)
    pixels = np.broadcast_to(ramp[None, :, None], (64, 160, 3)).copy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageSample(ImageRef(key, "x:", caption), buffer.getvalue(), "png", 160, 64, 160, 64)

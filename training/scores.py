"""Does the model read its prompts? `python -m training.scores --checkpoint runs/demo --out DIR`.

For captions of every split it paints a picture and asks a judge, a CLIP that the model has never
met, which of 16 captions fits the picture best: its own, the ten that share most words with it, and
five others. The share of pictures whose own caption wins is printed for training captions and for
each split that training never saw, beside the same judge's score on the real pictures (what a
perfect model would get) and chance. Each split also gets a sheet: generated picture, decoded cached
latent, caption. Of a picture that is not square the judge sees the part that was encoded.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import program
from pipeline.core.errors import BrokenShard, SettingError, StorageError
from pipeline.core.location import located
from pipeline.core.version import version_line
from pipeline.encoders import text_facts
from training import ranks
from training.config.sampling_options import check, device_of
from training.threads import share_cores
from training.weights import weights_metadata

if TYPE_CHECKING:
    import numpy as np

    from pipeline.core.commits import Commit
    from pipeline.core.store import Store
    from training.generator import Generator

CANDIDATES = 16  # captions the judge chooses from
NEAREST = 10  # of them share as many words as possible with the right one
SHOWN = 24  # pictures of a split on its sheet
MAX_SHARDS = 8  # of a split that are looked at


@dataclass(frozen=True)
class Example:
    """A real picture of the dataset, its own caption and its cached latent."""

    caption: str
    picture: np.ndarray  # uint8 (H, H, 3), the part of it that was encoded
    latent: np.ndarray  # raw, (C, h, w)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 after a line on standard error that says what to change; 1 after one that
    says what could not be read."""
    program.begin()
    ranks.alone()
    options = _parser().parse_args(arguments)
    share_cores()
    out = Path(options.out)
    try:
        check(options, ["count", "steps", "batch_size"])
        text_facts(options.judge)
        device_of(options.device)
        splits = read_examples(
            weights_metadata.read_metadata(weights_metadata.find(options.checkpoint)), options.root
        )
        _require_choice(splits)
        from training.generator import Generator

        generator = Generator(options.checkpoint, options.device)
        results = score(generator, splits, options)
        (out / "scores.json").write_text(json.dumps(results, indent=1) + "\n")
    except SettingError as error:
        print(f"scores: {error}", file=sys.stderr)
        return 2
    except (BrokenShard, StorageError) as error:
        print(f"scores: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"scores: cannot write {out}: {error}", file=sys.stderr)
        return 1
    print(f"\nOwn caption ranked first among {CANDIDATES} (chance {100 / CANDIDATES:.0f} %):")
    for split, row in results["splits"].items():
        print(
            f"  {split:8} generated {row['generated']:6.1%} of {row['pictures']}   "
            f"real {row['real']:6.1%}   {out / (split + '.png')}"
        )
    return 0


def score(
    generator: Generator, splits: dict[str, list[Example]], options: argparse.Namespace
) -> dict[str, Any]:
    """Paints, judges, writes the sheets; the numbers.

    Args:
        splits: see `read_examples`.

    Raises:
        SettingError: no such judge, or pictures that cannot be painted.
    """
    from pipeline.encoders import load_text
    from training.generate import Progress
    from training.observe.image_grid import contact_sheet

    judge = load_text(options.judge, images=True)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    every = sorted({e.caption for examples in splits.values() for e in examples})
    results: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "judge": options.judge,
        "guidance": options.guidance,
        "steps": options.steps,
        "seed": options.seed,
        "splits": {},
    }
    for split, examples in splits.items():
        chosen = _repeat(examples, options.count, random.Random(f"{options.seed} {split}"))
        captions = [example.caption for example in chosen]
        print(f"painting {len(captions)} captions of split {split}", file=sys.stderr, flush=True)
        report = Progress()
        try:
            pictures = generator.generate(
                captions, options.guidance, options.steps, options.seed, options.batch_size, report
            )
        finally:
            report.close()
        real = [example.picture for example in chosen]
        results["splits"][split] = {
            "pictures": len(captions),
            "generated": own_caption_first(judge, list(pictures), captions, every),
            "real": own_caption_first(judge, real, captions, every),
        }
        cells = [
            (example.caption, [picture, _decode(generator, example.latent)])
            for example, picture in zip(chosen[:SHOWN], pictures, strict=False)
        ]
        footer = "; ".join(
            ["left: generated, right: cached latent", *generator.metadata.attribution]
        )
        contact_sheet(cells, columns=6, footer=footer).save(out / f"{split}.png")
    return results


def own_caption_first(
    judge: Any, pictures: list[np.ndarray], captions: list[str], every: list[str]
) -> float:
    """Share of pictures for which the judge ranks the own caption above 15 others.

    Args:
        judge: has embed_images((N, H, W, 3) uint8) and embed_texts(list), unit vectors (N, E).
        pictures: uint8 (H, W, 3), of any sizes.
        every: captions that the others are drawn from; a function of the caption, not of order.
    """
    vectors = [judge.embed_images(picture[None])[0] for picture in pictures]
    known = dict(zip(every, judge.embed_texts(every), strict=True))
    hits = 0
    for vector, caption in zip(vectors, captions, strict=True):
        own = float(vector @ known[caption])
        others = [float(vector @ known[other]) for other in distractors(caption, every)]
        hits += own > max(others)
    return hits / len(captions)


def distractors(caption: str, every: list[str]) -> list[str]:
    """The NEAREST captions by shared words (Jaccard index, ties at random), then random ones."""
    rng = random.Random(caption)
    words = set(caption.split())
    others = [other for other in every if other != caption]
    rng.shuffle(others)

    def distance(other: str) -> float:
        found = set(other.split())
        return -len(words & found) / len(words | found)

    others.sort(key=distance)
    rest = others[NEAREST:]
    return others[:NEAREST] + rng.sample(rest, min(CANDIDATES - 1 - NEAREST, len(rest)))


def read_examples(metadata: Any, root: str = "") -> dict[str, list[Example]]:
    """Split -> pictures of the first source that the model was trained on, training split first.

    Args:
        root: where the groups are, local or remote; default: where they were in training.

    Raises:
        SettingError: weights that know of no source, or groups that are not under the root.
        BrokenShard: a shard that is gone or damaged.
        StorageError: the root cannot be read.
    """
    from pipeline.core import drops, layout
    from pipeline.core.published import read_index
    from pipeline.core.store import Store

    data = metadata.config.get("data")
    if not (isinstance(data, dict) and data.get("sources")):
        raise SettingError(
            f"weights of {metadata.run}, stage {metadata.stage}: they name no source (imported "
            "ones know of none), so there are no captions to score; give weights of a run"
        )
    store = Store(root or data.get("root", layout.DEFAULT_ROOT))
    source, first = next(iter(data["sources"])), data.get("split", "train")
    # Settings of older runs do not name what was the only kind then.
    kind = data.get("latents", "mean"), data.get("crop", "center")
    group = layout.latents_group(source, metadata.vae.name, metadata.resolution, *kind)
    try:
        shards = [(r["shard"], r["split"]) for _, r in read_index(store, group)]
    except FileNotFoundError as error:
        raise SettingError(
            f"--root {store.root}: no {group} there, which the model was trained on; name a root "
            "that has it"
        ) from error
    dropped = drops.read(store, source)
    splits: dict[str, list[Example]] = {first: []}
    seen: Counter[str] = Counter()
    for shard, split in shards:
        seen[split] += 1
        if seen[split] <= MAX_SHARDS:
            commit = _commit(store, group, shard)
            latents = _latents(store, group, commit, metadata.vae.channels)
            for key in dropped.get(shard, ()):
                latents.pop(key, None)
            crop = kind[1], commit.inputs.get("seed") or 0
            found = _join(store, layout.images_group(source), shard, latents, crop)
            splits.setdefault(split, []).extend(found)
    return {split: examples for split, examples in splits.items() if examples}


def _require_choice(splits: dict[str, list[Example]]) -> None:
    count = len({example.caption for examples in splits.values() for example in examples})
    if count < CANDIDATES:
        raise SettingError(
            f"{count} different captions of pictures with a latent are there; the judge chooses "
            f"from {CANDIDATES}"
        )


def _commit(store: Store, group: str, shard: str) -> Commit:
    from pipeline.core.commits import read_commit

    commit = read_commit(store, group, shard)
    if commit is None:
        raise SettingError(
            f"--root {store.root}: no shard {shard} in {group}; name a root that has it"
        )
    return commit


def _latents(store: Store, group: str, commit: Commit, channels: int) -> dict[str, np.ndarray]:
    """Key -> latent of a shard; of moments (mean, log variance) the mean, which is what the VAE's
    decoder is best shown."""
    from pipeline.core.commits import read_file
    from pipeline.core.mds import decode_shard, stored, unpack

    if commit.index is None:  # every picture of it was rejected
        return {}
    data = read_file(store, group, commit, stored(commit.index)["basename"])
    _, samples = decode_shard(unpack(data, commit.index))
    return {sample["key"]: sample["latent"][:channels] for sample in samples}


def _join(
    store: Store,
    images: str,
    shard: str,
    latents: dict[str, np.ndarray],
    crop: tuple[Any, int],
) -> list[Example]:
    """The shard's pictures that have a latent and a caption of their own.

    Args:
        crop: how the square that was encoded was cut, and the seed of it.
    """
    from pipeline.core.commits import read_file
    from pipeline.core.images import fit, read_pixels
    from pipeline.core.tars import read_samples

    examples = []
    for key, fields in read_samples(
        read_file(store, images, _commit(store, images, shard), ".tar")
    ):
        caption = fields.get("txt", b"").decode()
        data = next((d for e, d in fields.items() if e not in ("txt", "json")), b"")
        if key in latents and caption:
            pixels = read_pixels(data)
            # What the model was shown of it: a square, at the size of the picture.
            square = fit(pixels, min(pixels.shape[:2]), crop[0], crop[1], key)
            examples.append(Example(caption, square, latents[key]))
    return examples


def _repeat(examples: list[Example], count: int, rng: random.Random) -> list[Example]:
    """`count` examples in random order; all of them once before any comes twice."""
    chosen: list[Example] = []
    while len(chosen) < count:
        chosen += rng.sample(examples, min(len(examples), count - len(chosen)))
    return chosen


def _decode(generator: Generator, latent: np.ndarray) -> np.ndarray:
    import torch

    return generator.vae.decode(torch.from_numpy(latent.astype("float32"))[None])[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.scores", description="Does the model read its prompts?"
    )
    parser.add_argument("--version", action="version", version=version_line())
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        type=located,
        help="a run's folder, or a .safetensors file of one",
    )
    add("--out", required=True, type=located, help="folder for scores.json and a sheet a split")
    add(
        "--root",
        default="",
        type=located,
        help="data root; default: the one the model was trained from",
    )
    add(
        "--judge",
        default="tiny-clip-judge",
        type=located,
        help="a CLIP: a table name, a folder or a hub id",
    )
    add("--count", type=int, default=128, help="pictures a split")
    add("--guidance", type=float, default=2.5)
    add("--steps", type=int, default=16, help="Heun steps")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=32)
    add("--device", default="", help="e.g. cuda or cpu; default: a GPU where there is one")
    return parser


if __name__ == "__main__":
    sys.exit(main())

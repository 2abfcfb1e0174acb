"""Does the model read its prompts? `python -m training.scores --checkpoint runs/demo --out DIR`.

For captions of every split it paints a picture and asks a judge, a CLIP that the model has never
met, which of 16 captions fits the picture best: its own, the ten that share most words with it, and
five others. The share of pictures whose own caption wins is printed for training captions and for
each split that training never saw, beside the same judge's score on the real pictures (what a
perfect model would get) and chance. Each split also gets a sheet: generated picture, decoded cached
latent, caption.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import BrokenShard, SettingError, StorageError
from pipeline.core.version import version_line
from training.threads import share_cores

if TYPE_CHECKING:
    import numpy as np

    from training.generate import Painter

CANDIDATES = 16  # captions the judge chooses from
NEAREST = 10  # of them share as many words as possible with the right one
SHOWN = 24  # pictures of a split on its sheet
MAX_SHARDS = 8  # of a split that are looked at


@dataclass(frozen=True)
class Example:
    """A real picture of the dataset, its own caption and its cached latent."""

    caption: str
    picture: np.ndarray  # uint8 (H, W, 3)
    latent: np.ndarray  # raw, (C, h, w)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 after a line on standard error that says what to change; 1 after one that
    says what could not be read."""
    options = _parser().parse_args(arguments)
    share_cores()
    try:
        from training.generate import Painter

        painter = Painter(options.checkpoint, options.device)
        results = score(painter, options)
    except SettingError as error:
        print(f"scores: {error}", file=sys.stderr)
        return 2
    except (BrokenShard, StorageError) as error:
        print(f"scores: {error}", file=sys.stderr)
        return 1
    out = Path(options.out)
    (out / "scores.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nOwn caption ranked first among {CANDIDATES} (chance {100 / CANDIDATES:.0f} %):")
    for split, row in results["splits"].items():
        print(
            f"  {split:8} generated {row['generated']:6.1%} of {row['pictures']}   "
            f"real {row['real']:6.1%}   {out / (split + '.png')}"
        )
    return 0


def score(painter: Painter, options: argparse.Namespace) -> dict[str, Any]:
    """Paints, judges, writes the sheets; the numbers.

    Raises:
        SettingError: the shards that the model was trained on are not where they were.
    """
    from pipeline.encoders import load_text
    from training.generate import Progress
    from training.sheet import contact_sheet

    judge = load_text(options.judge, images=True)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    splits = read_examples(painter.passport, options.root)
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
        pictures = painter.paint(
            captions, options.guidance, options.steps, options.seed, options.batch_size, report
        )
        report.close()
        real = [example.picture for example in chosen]
        results["splits"][split] = {
            "pictures": len(captions),
            "generated": own_caption_first(judge, list(pictures), captions, every),
            "real": own_caption_first(judge, real, captions, every),
        }
        cells = [
            (example.caption, [picture, _decode(painter, example.latent)])
            for example, picture in zip(chosen[:SHOWN], pictures, strict=False)
        ]
        footer = "; ".join(["left: generated, right: cached latent", *painter.passport.attribution])
        contact_sheet(cells, columns=6, footer=footer).save(out / f"{split}.png")
    return results


def own_caption_first(
    judge: Any, pictures: list[np.ndarray], captions: list[str], every: list[str]
) -> float:
    """Share of pictures for which the judge ranks the own caption above 15 others.

    Args:
        judge: has embed_images((N, H, W, 3) uint8) and embed_texts(list), unit vectors (N, E).
        every: captions that the others are drawn from; a function of the caption, not of order.
    """
    import numpy as np

    vectors = judge.embed_images(np.stack(pictures))
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


def read_examples(passport: Any, root: str = "") -> dict[str, list[Example]]:
    """Split -> pictures of the first source that the model was trained on, training split first.

    Raises:
        SettingError: the groups are not under the root.
    """
    from streaming import LocalDataset

    from pipeline.core import drops, layout
    from pipeline.core.store import Store

    data = passport.config["data"]
    store = Store(root or data["root"])
    source = next(iter(data["sources"]))
    # Settings of older runs do not name what was the only kind then.
    kind = data.get("latents", "mean"), data.get("crop", "center")
    group = layout.latents_group(source, passport.vae.name, passport.resolution, *kind)
    if not store.local or not store.exists(f"{group}/index.json"):
        raise SettingError(
            f"--root {store.root}: no {group} there, which the model was trained on; "
            "name a local root that has it"
        )
    dropped = drops.read(store, source)
    latents = LocalDataset(store.url(group))
    index = store.read_json(f"{group}/index.json")
    splits: dict[str, list[Example]] = {data["split"]: []}
    first = 0
    seen: dict[str, int] = {}
    for entry, record in zip(index["shards"], index["inputs"], strict=True):
        rows = range(first, first := first + entry["samples"])
        split = record["split"]
        seen[split] = seen.get(split, 0) + 1
        if seen[split] <= MAX_SHARDS:
            gone = dropped.get(record["shard"], frozenset())
            samples = (latents[i] for i in rows)
            # Of moments (mean, log variance) the mean: what the VAE's decoder is best shown.
            channels = passport.vae.channels
            stored = {s["key"]: s["latent"][:channels] for s in samples if s["key"] not in gone}
            splits.setdefault(split, []).extend(
                _join(store, layout.images_group(source), record["shard"], stored)
            )
    return {split: examples for split, examples in splits.items() if examples}


def _join(store: Any, images: str, shard: str, latents: dict[str, np.ndarray]) -> list[Example]:
    """The shard's pictures that have a latent and a caption of their own."""
    import numpy as np

    from pipeline.core.commits import read_commit, read_file
    from pipeline.core.images import decode
    from pipeline.core.tars import read_samples

    commit = read_commit(store, images, shard)
    if commit is None:
        raise SettingError(
            f"--root {store.root}: no pictures of shard {shard} in {images}; name a root that has "
            "them"
        )
    examples = []
    for key, fields in read_samples(read_file(store, images, commit, ".tar")):
        caption = fields.get("txt", b"").decode()
        data = next((d for e, d in fields.items() if e not in ("txt", "json")), b"")
        if key in latents and caption:
            examples.append(Example(caption, np.array(decode(data)), latents[key]))
    return examples


def _repeat(examples: list[Example], count: int, rng: random.Random) -> list[Example]:
    """`count` examples in random order; all of them once before any comes twice."""
    chosen: list[Example] = []
    while len(chosen) < count:
        chosen += rng.sample(examples, min(len(examples), count - len(chosen)))
    return chosen


def _decode(painter: Painter, latent: np.ndarray) -> np.ndarray:
    import torch

    return painter.vae.decode(torch.from_numpy(latent.astype("float32"))[None])[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.scores", description="Does the model read its prompts?"
    )
    parser.add_argument("--version", action="version", version=version_line())
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's folder, or a .safetensors file of one")
    add("--out", required=True, help="folder for scores.json and a sheet a split")
    add("--root", default="", help="data root; default: the one the model was trained from")
    add("--judge", default="tiny-clip-judge", help="a CLIP: a table name, a folder or a hub id")
    add("--count", type=int, default=128, help="pictures a split")
    add("--guidance", type=float, default=2.5)
    add("--steps", type=int, default=16, help="Heun steps")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=32)
    add("--device", default="", help="e.g. cuda or cpu; default: a GPU where there is one")
    return parser


if __name__ == "__main__":
    sys.exit(main())

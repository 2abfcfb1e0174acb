"""Trains `tiny-clip` (conditions the demo model) and `tiny-clip-judge` (judges its pictures).

    python -m pipeline.tiny.train_clip --seed 0 --out pipeline/encoders/weights/tiny-clip
    python -m pipeline.tiny.train_clip --seed 1 --out pipeline/encoders/weights/tiny-clip-judge

An open_clip CLIP (ViT image tower, causal text tower) with a byte-level BPE of 2,048 tokens trained
on the same captions. Data: about 3,700 OpenMoji composited on the source's backgrounds with small
shifts, blur and noise; half of every batch are the demo's 64 glyphs. Pairs that the source holds
out (`split_of`) are never drawn. Loss: symmetric cross-entropy over the batch (Radford et al. 2021,
arXiv 2103.00020, Fig. 3), equal captions counted as one.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torchvision.transforms.functional import gaussian_blur
from transformers import PreTrainedTokenizerFast

from captioning.colour import describe
from pipeline.sources.openmoji import BACKGROUNDS, STARTER, caption, split_of
from pipeline.tiny.pictures import all_names, composite, glyph_split, sheet

SIZE = 64  # the image tower sees 64 x 64 pixels
VOCABULARY = 2048
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": SIZE,
        "patch_size": 8,
        "layers": 3,
        "width": 128,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": VOCABULARY,
        "width": 128,
        "heads": 4,
        "layers": 2,
        "hf_tokenizer_name": "tokenizer.json",  # read from the folder itself
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    names = {s: [n for n in all_names() if glyph_split(n) == s] for s in ("train", "test")}
    pictures = dict(zip(all_names(), sheet(all_names(), SIZE), strict=True))
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(names["train"], args.out)
    config = {
        "model_cfg": MODEL,
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
    }
    (args.out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    folder = f"local-dir:{args.out}"
    tokenizer = open_clip.get_tokenizer(folder)
    model: Any = open_clip.create_model(folder, load_weights=False)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(names['train'])} glyphs, {args.steps} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=args.steps, pct_start=0.1
    )
    start = time.time()
    for step in range(1, args.steps + 1):
        pairs = draw_pairs(names["train"], args.batch)
        texts, ids = [], []
        for glyph, background in pairs:
            text = caption(glyph, background)
            if random.random() < 0.15:
                text = glyph
            elif random.random() < 0.1:
                text = describe(to_image(pictures[glyph], background))
            texts.append(text)
            ids.append(text)
        x = augment(torch.stack([pictures[g] for g, _ in pairs]), [b for _, b in pairs])
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(x, normalize=True)
            text = model.encode_text(tokenizer(texts), normalize=True)
        logits = model.logit_scale.exp() * image.float() @ text.float().T
        same = torch.tensor([[float(a == b) for b in ids] for a in ids])
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)  # CLIP's bound: at most 100
        if step % 100 == 0 or step == args.steps:
            print(f"step {step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
    model.eval()
    report = {
        "data": "OpenMoji 17.0.0 (CC BY-SA 4.0), held-out glyph-background pairs never drawn",
        "parameters": parameters,
        "steps": args.steps,
        "minutes": round((time.time() - start) / 60, 1),
        "top1_of_512_training_pairs": retrieval(model, tokenizer, pictures, STARTER, "train"),
        "top1_of_512_heldout_pairs": retrieval(model, tokenizer, pictures, STARTER, "heldout"),
        "top1_of_16_unseen_emoji": unseen(model, tokenizer, pictures, names["test"]),
        "licence": "CC BY-SA 4.0 (trained on OpenMoji)",
    }
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, args.out / "open_clip_model.safetensors")
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def write_tokenizer(names: list[str], folder: Path) -> None:
    """A byte-level BPE: any caption can be read; end-of-text has the highest id (CLIP's rule)."""
    corpus = [caption(n, b) for n in names for b in BACKGROUNDS]
    corpus += [f"mostly {b}, with {b}, black, brown, pink and {b}" for b in BACKGROUNDS] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(["<start_of_text>", "<end_of_text>"])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"{tokenizer.get_vocab_size()} tokens, {VOCABULARY} expected")
    start, end = (tokenizer.token_to_id(t) for t in ("<start_of_text>", "<end_of_text>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start_of_text> $A <end_of_text>",
        special_tokens=[("<start_of_text>", start), ("<end_of_text>", end)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start_of_text>",
        eos_token="<end_of_text>",
        model_max_length=MODEL["text_cfg"]["context_length"],
    ).save_pretrained(folder)


def draw_pairs(names: list[str], count: int) -> list[tuple[str, str]]:
    """`count` training pairs; each glyph comes on two backgrounds, so the background matters."""
    pairs: list[tuple[str, str]] = []
    for i in range(count // 2):
        glyph = random.choice(STARTER if i % 2 else names)
        allowed = [b for b in BACKGROUNDS if split_of(glyph, b) == "train"]
        pairs += [(glyph, b) for b in random.sample(allowed, 2)]
    return pairs


def augment(rgba: torch.Tensor, backgrounds: list[str]) -> torch.Tensor:
    """(B, 64, 64, 4) uint8 -> (B, 3, 64, 64) in [-1, 1]: shifted, blurred, noisy, jittered."""
    shift = torch.randint(-4, 5, (2,)).tolist()
    rgba = torch.roll(rgba, shift, (1, 2))
    colours = torch.tensor([BACKGROUNDS[b] for b in backgrounds], dtype=torch.float32)
    x = composite(rgba, (colours + 8 * torch.randn_like(colours)).clamp(0, 255))
    if random.random() < 0.5:
        x = gaussian_blur(x, [5, 5], [random.uniform(0.4, 1.5)] * 2)
    return x + torch.randn_like(x) * random.uniform(0, 0.15)


def to_image(rgba: torch.Tensor, background: str):
    from PIL import Image

    colours = torch.tensor([BACKGROUNDS[background]], dtype=torch.float32)
    x = composite(rgba[None], colours)[0]
    return Image.fromarray(((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


@torch.no_grad()
def embed_pairs(model, tokenizer, pictures, pairs) -> tuple[torch.Tensor, torch.Tensor]:
    colours = torch.tensor([BACKGROUNDS[b] for _, b in pairs], dtype=torch.float32)
    x = composite(torch.stack([pictures[g] for g, _ in pairs]), colours)
    image = model.encode_image(x, normalize=True)
    text = model.encode_text(tokenizer([caption(*p) for p in pairs]), normalize=True)
    return image, text


def retrieval(model, tokenizer, pictures, glyphs, split: str) -> float:
    """Share of the split's pictures whose own caption ranks first among all glyphs' captions."""
    pairs = [(g, b) for g in glyphs for b in BACKGROUNDS]
    image, text = embed_pairs(model, tokenizer, pictures, pairs)
    right = (image @ text.T).argmax(1) == torch.arange(len(pairs))
    chosen = torch.tensor([split_of(*p) == split for p in pairs])
    return round(right[chosen].float().mean().item(), 4)


def unseen(model, tokenizer, pictures, names: list[str]) -> float:
    """Top-1 among 16 captions of emoji never trained on (chance 0.0625), all on white."""
    rng = random.Random(0)
    hits = []
    for _ in range(200):
        pairs = [(name, "white") for name in rng.sample(names, 16)]
        image, text = embed_pairs(model, tokenizer, pictures, pairs)
        hits.append((image @ text.T).argmax(1) == torch.arange(16))
    return round(torch.cat(hits).float().mean().item(), 4)


if __name__ == "__main__":
    main()

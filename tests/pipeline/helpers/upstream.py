"""Small corpora in the exact layouts of upstream's, with real pictures, for a HubServer."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIGNED = "Policy=s3cr3t-policy&Signature=s3cr3t-signature"  # of SA-1B's links


def picture(seed: int, width: int = 320, height: int = 280, form: str = "JPEG", **options) -> bytes:
    """A smooth picture that no other seed has."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, form, **options)
    return buffer.getvalue()


def tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tgz(members: Iterable[tuple[str, bytes]]) -> bytes:
    return gzip.compress(tar(members), mtime=0)


def zipped(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members:
            file.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


class Sample(NamedTuple):
    key: str
    caption: str
    data: bytes


def samples(number: int, count: int = 4) -> list[Sample]:
    return [
        Sample(
            f"{number:04d}{n:05d}", f"Picture <b>{n}</b> of tar {number}", picture(number * 100 + n)
        )
        for n in range(count)
    ]


def wds_tar(found: list[Sample]) -> bytes:
    """As img2dataset writes, and pixparse publishes: KEY.jpg, KEY.json, KEY.txt."""
    members = []
    for sample in found:
        facts = {
            "key": sample.key,
            "caption": sample.caption,
            "url": f"http://web/{sample.key}.jpg",
        }
        members += [
            (f"{sample.key}.jpg", sample.data),
            (f"{sample.key}.json", json.dumps(facts).encode()),
            (f"{sample.key}.txt", sample.caption.encode()),
        ]
    return tar(members)


def cc12m(tars: int = 2) -> dict[str, bytes]:
    files = {f"cc12m-train-{n:04d}.tar": wds_tar(samples(n)) for n in range(tars)}
    return {"README.md": b"CC12M", **files}


def sa1b_tar(numbers: list[int], width: int = 900, height: int = 600) -> bytes:
    members = []
    for n in numbers:
        masks = {"image": {"image_id": n, "file_name": f"sa_{n}.jpg"}, "annotations": []}
        members += [
            (f"./sa_{n}.jpg", picture(n, width, height)),
            (f"./sa_{n}.json", json.dumps(masks).encode()),
        ]
    return tar(members)


def sa1b_links(url: str, names: Iterable[str]) -> str:
    """Meta's list; it also names a file that is no tar of pictures."""
    rows = [f"{name}\t{url}/{name}?{SIGNED}&oe=67A68F58" for name in names]
    return (
        "\n".join(["file_name\tcdn_link", *rows, f"sa_images_ids.txt\t{url}/ids?{SIGNED}"]) + "\n"
    )


def sa1b_captions(numbers: Iterable[int]) -> bytes:
    """PixArt's archive: in no order."""
    shuffled = sorted(numbers, key=lambda n: n * 7919 % 101)
    return tgz((f"SA1B_caption/sa_{n}.txt", f"The image shows {n}.\n".encode()) for n in shuffled)


def journeydb(prompts: dict[str, dict[int, list[str]]]) -> dict[str, bytes]:
    """
    Args:
        prompts: split -> archive's number -> a prompt for each picture; None: not annotated.
    """
    names = {
        "train": "train_anno_realease_repath.jsonl",
        "valid": "valid_anno_repath.jsonl",
    }
    files: dict[str, bytes] = {}
    for split, archives in prompts.items():
        lines = []
        for number, texts in archives.items():
            members = []
            for n, prompt in enumerate(texts):
                name = f"{number:03d}/{split}-{number}-{n}.jpg"
                members.append((name, picture(number % 10**6 * 1000 + n, 520, 530)))
                if prompt is not None:
                    record = {
                        "uuid": f"{n}",
                        "prompt": prompt,
                        "img_path": f"./{name}",
                        "Task2": {},
                    }
                    lines.append(json.dumps(record))
            files[f"data/{split}/imgs/{number:03d}.tgz"] = tgz(members)
        data = "\n".join(lines).encode() + b"\n"
        files[f"data/{split}/{names[split]}.tgz"] = tgz([(names[split], data)])
    return files


def diffusiondb(parts: dict[int, list[tuple[str, float, float]]]) -> dict[str, bytes]:
    """
    Args:
        parts: part -> (prompt, image_nsfw, prompt_nsfw) of each picture; no prompt: no row.
    """
    files, rows = {}, []
    for part, pictures in parts.items():
        members, index = [], {}
        for n, (prompt, image_nsfw, prompt_nsfw) in enumerate(pictures):
            name = f"{part:06d}-{n}.webp"
            members.append(
                (name, picture(part * 1000 + n, 512, 512, "WEBP", lossless=True, method=0))
            )
            index[name] = {"p": prompt, "se": n, "c": 7.0, "st": 50, "sa": "k_lms"}
            if prompt is not None:
                rows.append(
                    {
                        "image_name": name,
                        "prompt": prompt,
                        "part_id": part,
                        "seed": n,
                        "image_nsfw": image_nsfw,
                        "prompt_nsfw": prompt_nsfw,
                    }
                )
        members.append((f"part-{part:06d}.json", json.dumps(index).encode()))
        folder = f"diffusiondb-large-part-{1 if part <= 10_000 else 2}"
        files[f"{folder}/part-{part:06d}.zip"] = zipped(members)
    rows.sort(key=lambda row: row["image_name"][::-1])  # not in order of part
    return {**files, "metadata-large.parquet": parquet(rows)}


def coco2014(ids: list[int]) -> dict[str, bytes]:
    """Five captions an image; the zip is in no order."""
    name = "COCO_val2014_{:012d}.jpg".format
    images = [{"id": n, "file_name": name(n), "height": 280, "width": 320} for n in ids]
    annotations = [
        {"image_id": n, "id": n * 10 + k, "caption": f"Caption {k} of {n}\n"}
        for k in range(5)
        for n in reversed(ids)
    ]
    record = json.dumps({"images": images, "annotations": annotations}).encode()
    zip_of_pictures = [("val2014/", b""), *((f"val2014/{name(n)}", picture(n)) for n in ids)]
    return {
        "zips/val2014.zip": zipped(zip_of_pictures),
        "annotations/annotations_trainval2014.zip": zipped(
            [
                ("annotations/instances_val2014.json", b"{}"),
                ("annotations/captions_val2014.json", record),
            ]
        ),
    }

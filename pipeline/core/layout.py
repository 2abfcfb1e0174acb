"""Where things lie under one data root: the only place that builds these paths.

    <root>/<source>/images/                                 tars, parquets, stats
    <root>/<source>/captions/<captioner>/                   parquets
    <root>/<source>/latents/<vae>/<resolution>[.<kind>]/          MDS column group
    <root>/<source>/text/<encoder>/<captions>.<mode>[.int8]/      MDS column group
    <root>/<source>/official/<name>/                        the official code's single MDS
    <root>/<source>/lists/                                  what a source keeps of its lists

Every group holds index.json (MDS groups), manifest.json, data files, commits/, rejects/.
"""

from __future__ import annotations

import hashlib
import re

ROOT_VARIABLE = "MICRODIT_ROOT"  # default of every --root and of the trainer's data.root
DEFAULT_ROOT = "data"
KINDS = ("images", "captions", "latents", "text", "official")  # of groups; folders of a source


def images_group(source: str) -> str:
    return f"{source}/images"


def lists_folder(source: str) -> str:
    """No group: files named by their content, which a source's shards refer to."""
    return f"{source}/lists"


def captions_group(source: str, captioner: str) -> str:
    return f"{source}/captions/{slug(captioner)}"


def latents_group(
    source: str, vae: str, resolution: int, latents: str = "mean", crop: str = "center"
) -> str:
    """What is not the default shows in the name: 256, 256.moments, 256.sample.random."""
    kinds = [kind for kind in (latents, crop) if kind not in ("mean", "center")]
    return f"{source}/latents/{slug(vae)}/{'.'.join([str(resolution), *kinds])}"


def text_group(source: str, encoder: str, captions: str, mode: str, dtype: str = "float16") -> str:
    """`captions`: a captioner's name ("alt" = the source's own) or a mix, "alt:0.9,colour:0.1"."""
    suffix = "" if dtype == "float16" else f".{dtype}"
    return f"{source}/text/{slug(encoder)}/{slug(captions)}.{mode}{suffix}"


def official_group(source: str, name: str) -> str:
    return f"{source}/official/{slug(name)}"


def slug(name: str) -> str:
    """A name (hub id, folder, caption mix) as one path component.

    What has no place in one, such as letters of other scripts, is told apart by a hash of the name.
    Two that still share a folder ("a/b" and "a--b"; "VAE" and "vae", where the file system takes
    them for one) are told apart by their commits: see `pipeline.core.facts`.
    """
    text = name.strip("/").replace(":", "-").replace(",", "+")
    text = re.sub(r"[^A-Za-z0-9._+-]+", "--", text)
    if re.fullmatch(r"[A-Za-z0-9._+/:,@-]+", name) and text.strip("."):
        return text
    return f"{text}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

"""A page with some of a group's pictures and their captions: one HTML file that needs no other."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections import Counter
from typing import Any

from PIL import Image

from pipeline.core import layout
from pipeline.core.commits import Commit, read_commit, read_file
from pipeline.core.errors import BrokenShard
from pipeline.core.images import BadPicture, decode
from pipeline.core.store import Store
from pipeline.core.tables import from_parquet
from pipeline.stages.caption_text import facts, histogram
from pipeline.stages.images import read_images

PICTURES = 24
SHARDS = 3  # that they are taken from where that is enough: each is read whole
SIDE = 256  # pixels of the longer side


def page(
    store: Store, source: str, group: str, label: str, counters: Counter[str], seconds: float
) -> str:
    """The page of a group of captions as it is now.

    Args:
        counters: what a run's workers counted, for the lines at the top.
        seconds: the run took.
    """
    from jinja2 import Environment

    shown, unread = _choose(store, source, group)
    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    bars = histogram(counters)
    return template.render(
        title=f"{source}: captions by {label}",
        facts=facts(counters, seconds),
        bars=[(name, n, 100 * n / max(1, *bars.values())) for name, n in bars.items()],
        samples=shown,
        unread=unread,
    )


def _choose(store: Store, source: str, group: str) -> tuple[list[dict[str, Any]], list[str]]:
    """PICTURES of the group with all their captions, picked by hash; what could not be read."""
    shards = [name.removesuffix(".json") for name in store.names(f"{group}/commits")]
    spread = shards[:: max(1, len(shards) // SHARDS)][:SHARDS]
    shown: list[dict[str, Any]] = []
    unread: list[str] = []
    # Further shards where these are too small.
    for number, shard in enumerate([*spread, *(s for s in shards if s not in spread)][:PICTURES]):
        if len(shown) == PICTURES:
            break
        wanted = math.ceil((PICTURES - len(shown)) / max(1, len(spread) - number))
        captions = read_commit(store, group, shard)
        pictures = read_commit(store, layout.images_group(source), shard)
        if captions is None or pictures is None:
            continue  # another run has taken it back since
        try:
            for sample in _of_shard(store, source, group, captions, pictures, wanted):
                try:
                    url = _thumbnail(sample.pop("data"))
                except BadPicture as error:  # a server is sent files that nobody has decoded
                    unread.append(f"{sample['key']}: {error}")
                else:
                    shown.append({**sample, "url": url})
        except BrokenShard as error:
            unread.append(str(error))
    return shown, unread


def _of_shard(
    store: Store, source: str, group: str, captions: Commit, pictures: Commit, wanted: int
) -> list[dict[str, Any]]:
    rows = from_parquet(read_file(store, group, captions, ".parquet")).to_pylist()
    keys = sorted({row["key"] for row in rows}, key=lambda k: hashlib.sha256(k.encode()).digest())
    chosen = set(keys[:wanted])
    said: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["key"] in chosen:
            said.setdefault(row["key"], []).append(row)
    images = read_images(store, layout.images_group(source), pictures)
    return [
        {"key": image.key, "data": image.data, "captions": said[image.key]}
        for image in images
        if image.key in said
    ]


def _thumbnail(data: bytes) -> str:
    image = decode(data)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; max-width: 75rem }
body { margin: 2rem auto; padding: 0 1rem }
.samples { display: grid; gap: 1.5rem }
.samples { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)) }
figure { margin: 0 }
img { display: block; max-width: 100%; height: auto }
figcaption p { margin: .4rem 0; overflow-wrap: anywhere }
small { color: #666 }
.bar { background: #48c; display: inline-block; height: .7em }
td { padding: 0 .6rem 0 0; text-align: right }
td:last-child { text-align: left; width: 20rem }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ facts }}</p>
<table>
<caption>words in a caption</caption>
{% for name, number, share in bars %}
<tr><td>{{ name }}</td><td>{{ number }}</td>
<td><span class="bar" style="width: {{ share | round(1) }}%"></span></td></tr>
{% endfor %}
</table>
{% for line in unread %}
<p>not shown: {{ line }}</p>
{% endfor %}
<div class="samples">
{% for sample in samples %}
<figure>
<img src="{{ sample.url }}" alt="{{ sample.key }}">
<figcaption><small>{{ sample.key }}</small>
{% for row in sample.captions %}
<p>{{ row.caption }}
{% if row.finish_reason == "length" %}<small>(truncated)</small>{% endif %}</p>
{% endfor %}
</figcaption>
</figure>
{% endfor %}
</div>
</body>
</html>
"""

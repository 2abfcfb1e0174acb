from __future__ import annotations

import io

import pytest
from PIL import Image

from pipeline.core.errors import SettingError
from pipeline.sources.openmoji import BACKGROUNDS, STARTER, OpenMoji, caption, codes, split_of
from tests.pipeline.helpers.roots import pictures


def test_the_default_set_is_64_glyphs_on_8_backgrounds_with_one_pair_each_held_out():
    shards = OpenMoji().shards()
    pairs = {
        s: [p for shard in shards if shard.split == s for p in shard.spec]
        for s in ("train", "heldout")
    }
    assert len(set(STARTER)) == 64
    assert len(pairs["train"]) == 64 * 7
    assert len(pairs["heldout"]) == 64
    assert {glyph for glyph, _ in pairs["heldout"]} == set(STARTER)
    assert not set(pairs["train"]) & set(pairs["heldout"])
    assert {background for _, background in pairs["train"]} == set(BACKGROUNDS)


def test_shard_ids_are_unique_and_ordered():
    ids = [shard.id for shard in OpenMoji(samples_per_shard=10).shards()]
    assert ids == sorted(set(ids))


def test_a_shard_renders_to_captioned_pictures():
    sample = pictures(OpenMoji(glyphs="avocado", backgrounds="blue,red", size=40))[0]
    image = Image.open(io.BytesIO(sample.data)).convert("RGB")
    assert image.size == (40, 40)
    background = sample.ref.url.split("=")[1]
    assert image.getpixel((0, 0)) == BACKGROUNDS[background]
    assert sample.ref.caption == f"avocado on a {background} background"
    assert image.getpixel((20, 26)) != BACKGROUNDS[background]


def test_articles():
    assert caption("fox", "orange") == "fox on an orange background"


def test_every_glyph_has_exactly_one_held_out_background():
    for glyph in list(codes())[::50]:
        assert [split_of(glyph, b) for b in BACKGROUNDS].count("heldout") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"glyphs": "avocadoo"}, 'mean "avocado"'), ({"backgrounds": "blu"}, 'mean "blue"')],
)
def test_a_mistyped_name_gets_the_nearest(settings, message):
    with pytest.raises(SettingError, match=message):
        OpenMoji(**settings).shards()

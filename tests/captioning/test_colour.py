from __future__ import annotations

from PIL import Image

from captioning import load


def test_one_colour_is_all_of_it():
    (caption,) = load("colour")([Image.new("RGB", (50, 40), (255, 255, 255))])
    assert caption.text == "all white"
    assert caption.captioner == "colour"


def test_shares_decide_the_order():
    image = Image.new("RGB", (64, 64), (30, 80, 170))
    image.paste((210, 45, 40), (0, 0, 32, 32))
    image.paste((0, 0, 0), (32, 0, 64, 16))
    (caption,) = load("colour")([image])
    assert caption.text == "mostly blue, with red and black"


def test_captions_come_in_order():
    images = [Image.new("RGB", (8, 8), c) for c in ((0, 0, 0), (255, 255, 255))]
    assert [c.text for c in load("colour")(images)] == ["all black", "all white"]

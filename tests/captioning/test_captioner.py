"""What holds for every captioner of the table, and the settings that they share."""

from __future__ import annotations

import io
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import ExifTags, Image

from captioning import CAPTIONERS, BadPicture, BadSetting, Failure, Picture, Settings, load
from captioning.captioner import _opened
from captioning.clean import is_refusal
from captioning.colour import ColourCaptioner
from captioning.prompts import find_prompts, named

#: Settings without which a captioner cannot be made.
REQUIRED = {"endpoint": {"model": "a-model"}}


@pytest.mark.parametrize("name", CAPTIONERS)
def test_a_captioner_of_the_table_is_made_named_and_sent_to_a_worker_without_weights(name):
    captioner = load(name, **REQUIRED.get(name, {}))
    assert captioner.name == name
    assert captioner.label().startswith(name)
    json.dumps(captioner.decisive())
    copy = pickle.loads(pickle.dumps(captioner))
    assert (copy.name, copy.decisive()) == (captioner.name, captioner.decisive())


def test_an_unknown_captioner_lists_those_there_are():
    with pytest.raises(BadSetting, match=r'did you mean "colour".*known: colour'):
        load("colours")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "shrot"}, r'prompt=shrot: unknown; did you mean "short"\?'),
        ({"prompt": "long,shrot"}, r'did you mean "short"\?'),
        ({"prompt": "  "}, "prompt='  ': empty"),
        ({"prompt": "long, short, long"}, "long is there twice; name it once"),
        ({"prompt": "<image> and <image>"}, "several <image> slots"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"num_captions": 0}, "num_captions=0"),
        ({"num_captions": 2}, "at temperature 0 a prompt gives one caption"),
        ({"num_captions": 1, "prompt": "long,short"}, "there are 2 prompts"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"device": "tpu"}, "device=tpu: use one of cpu, cuda"),
        ({"promt": "short"}, r'promt: no setting of .* did you mean "prompt"\?'),
    ],
)
def test_a_bad_setting_is_one_line_that_says_how_to_mend_it(settings, message):
    with pytest.raises(BadSetting, match=message) as caught:
        load("llava-1.5-7b", **settings)
    assert "\n" not in str(caught.value)


def test_prompts_take_turns_and_show_in_the_label():
    two = Settings(prompt="long, short", num_captions=3, temperature=0.5)
    assert [two.prompt_of(n).label for n in range(3)] == ["long", "short", "long"]
    labels = [
        load("llava-1.5-7b", **settings).label()
        for settings in (
            {},
            {"prompt": "long", "max_tokens": 9, "seed": 5},
            {"prompt": "short"},
            {"prompt": "long,short"},
            {"prompt": "What is it?"},
            {"prompt": "What is that?"},
            {"temperature": 0.7, "num_captions": 3},
        )
    ]
    assert labels[:2] == ["llava-1.5-7b", "llava-1.5-7b"]
    assert labels[2:4] == ["llava-1.5-7b.short", "llava-1.5-7b.long.short"]
    assert labels[-1] == "llava-1.5-7b.n3.t0.7"
    assert len(set(labels)) == len(labels) - 1


def test_every_prompt_is_one_line_and_can_be_asked_for_again():
    for name, text in named().items():
        (prompt,) = find_prompts(name)
        assert prompt.text == text == " ".join(text.split())
        assert Settings(prompt=name).asked() == name
    assert Settings(prompt="long, short").asked() == "long,short"
    assert Settings(prompt=" What is it? ").asked() == "What is it?"


def test_noise_is_a_function_of_seed_key_and_number():
    seeds = {
        Settings(seed=seed).noise_seed(key, number)
        for seed in (0, 1)
        for key in ("a", "b")
        for number in (0, 1)
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_picture_that_cannot_be_opened_fails_alone():
    def broken() -> Image.Image:
        raise BadPicture("undecodable", "half of it is missing")

    good = Image.new("RGB", (8, 8), (255, 0, 0))
    answers: dict[str, Any] = dict(
        load("colour").caption([Picture("bad", broken), Picture("good", lambda: good)])
    )
    assert answers["bad"] == Failure("undecodable", "half of it is missing")
    assert [caption.text for caption in answers["good"]] == ["all red"]


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("Sorry, the picture is too dark.", True),
        ("I cannot describe people.", True),
        ("I apologize, but I'm unable to tell who this is.", True),
        ("My apologies, but that is not possible.", True),
        ("As an AI, I see no picture.", True),
        ("A sorry-looking dog sits in the rain.", False),
        ("I see a dog.", False),
        ("A sign that says “I cannot swim”.", False),
    ],
)
def test_refusals_are_told_from_captions(text, refusal):
    assert is_refusal(text) is refusal


# Pillow's pictures, without a pipeline


def test_a_picture_with_transparency_stands_on_white():
    (caption,) = load("colour")([Image.new("RGBA", (8, 8), (0, 0, 0, 0))])
    assert caption.text == "all white"


def test_a_picture_that_lies_on_its_side_is_turned():
    image = Image.new("RGB", (8, 4))
    image.getexif()[ExifTags.Base.Orientation] = 6
    assert _opened(image, threading.Lock())().size == (4, 8)


def test_half_a_file_is_a_bad_picture():
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(buffer, "JPEG")
    half = Image.open(io.BytesIO(buffer.getvalue()[:3000]))
    with pytest.raises(BadPicture, match="picture 1: OSError") as caught:
        load("colour")([Image.new("RGB", (8, 8)), half])
    assert caught.value.reason == "undecodable"


class InThreads(ColourCaptioner):
    """Opens each picture in four threads at once, as a model with four prompts may."""

    def caption(self, pictures):
        with ThreadPoolExecutor(4) as pool:
            for picture in pictures:
                opened = list(pool.map(lambda _, p=picture: p.open().tobytes(), range(4)))
                assert len(set(opened)) == 1
                yield picture.key, []


def test_a_file_that_is_not_yet_read_is_opened_by_one_thread_at_a_time():
    buffer = io.BytesIO()
    Image.effect_noise((2000, 2000), 50).save(buffer, "PNG")
    InThreads("colour", None)([Image.open(io.BytesIO(buffer.getvalue()))])

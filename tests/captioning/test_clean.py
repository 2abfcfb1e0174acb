from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from captioning.clean import clean, one_line, trim_habits
from captioning.clean_rules import HABITS, RULES, Rule


@pytest.mark.parametrize("rule", [*RULES, *HABITS], ids=lambda rule: rule.why.replace(" ", "_"))
def test_each_rule_does_what_its_example_says_and_is_then_done(rule: Rule):
    before, after = rule.example
    assert before != after
    assert rule.apply(before) == after
    assert rule.apply(after) == after


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Red Fox, resting.", "a red fox, resting."),
        ("Vintage FOX print – 1920x1080 PNG images | free shipping", "vintage fox print"),
        (
            "<person> photographed by @someone at https://a.example.com/x?y",
            "person photographed by at",
        ),
        ("IMG_2034.jpg", ""),
        ('"Foxes &amp; cubs"', "foxes cubs"),
        ("the%2520red+fox #123", "the red fox"),
        ("cafÃ© terrace : evening,rain", "café terrace: evening, rain"),
        ("foxes-in-the-deep-snow-123456", "foxes in the deep snow"),
        ("", ""),
        ("....", ""),
    ],
)
def test_captions_as_they_are_found(text, cleaned):
    assert clean(text) == cleaned


def test_the_case_is_kept_where_that_is_asked_for():
    assert clean("A Fox in Paris, FREE Shipping", lower=False) == "A Fox in Paris"


def test_a_captioned_sentence_is_left_alone():
    text = "A red fox rests on a snowy hill; behind it, two pine trees stand in fog."
    assert clean(text, lower=False) == text
    assert trim_habits(text) == text


def test_habits_go_and_the_sentence_begins_with_a_capital():
    text = "The image features a red fox.\n\nIt rests on snow. Overall, the scene is calm."
    assert trim_habits(text) == "A red fox. It rests on snow."
    assert trim_habits("Caption: In this picture, there are two foxes.") == "Two foxes."


@pytest.mark.parametrize(
    ("text", "trimmed"),
    [
        ("In the picture frame, a fox sits.", None),
        ("In the scene of a crime, a fox sits.", None),
        ("Sure footed goats climb.", None),
        ("Certainly happy foxes play.", None),
        ("In the image, a fox sits.", "A fox sits."),
        ("In this photo you can see a fox.", "A fox."),
        ("Sure here is a caption: A fox.", "A fox."),
        ("Of course! Here’s one: A fox.", "A fox."),
    ],
)
def test_only_phrases_that_say_nothing_go(text, trimmed):
    assert trim_habits(text) == (trimmed or text)


def test_one_line_holds_no_control_character_and_no_half_of_a_pair():
    assert one_line("a\x00b\r\n c\x1b\u2028d \ud800e\ufeff") == "a b c d e"


TEXT = st.text(st.characters(), max_size=200)
PIECES = (
    "fox Fox %25 %2541 + & &amp; &amp;amp; &lt;b&gt; <b> </b> http:// www: a.com/ .jpg x1y2 12x3 "
    "#12 123456 - -- _ ' \" “ ” , . / : ; ( ) @ \\n ... 狐 ½ Ã© İ ﬁ page 3 3:45 1.2.3.4"
)
LIKELY = st.lists(st.sampled_from(PIECES.split()), max_size=12).flatmap(
    lambda parts: st.sampled_from(["", " "]).map(lambda gap: gap.join(parts))
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(TEXT, LIKELY), st.booleans())
@example("%25" * 60 + "41", True)
@example("&amp;" * 3 + "lt;b&amp;gt;", False)
@example("\ud800", True)
def test_cleaning_any_text_is_idempotent_and_bounded(text, lower):
    cleaned = clean(text, lower)
    assert clean(cleaned, lower) == cleaned
    assert len(cleaned) <= 4 * len(text)
    assert cleaned == cleaned.strip() == one_line(cleaned)
    cleaned.encode()


@settings(max_examples=200, deadline=None)
@given(st.one_of(TEXT, st.lists(st.sampled_from([r.example[0] for r in HABITS])).map(" ".join)))
def test_trimming_is_idempotent_and_never_adds(text):
    trimmed = trim_habits(text)
    assert trim_habits(trimmed) == trimmed
    assert len(trimmed) <= 2 * len(text)
    trimmed.encode()


@pytest.mark.parametrize(
    "piece",
    ["a1", "-.", "a.", "<b", "http:", "1.", "%25", "&amp;", " . ", '"', "-", "x1x", "a: ", "<!--"],
)
def test_no_text_takes_long(piece):
    started = time.perf_counter()
    clean(piece * (10_000 // len(piece)))
    assert time.perf_counter() - started < 3

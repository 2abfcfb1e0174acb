"""Captions out of what vision-language models write around them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning import Caption
from captioning.answer import answer
from captioning.endpoint.answer import read
from pipeline.stages.caption_text import Refused, finish, no_caption

CAT = "A cat sits on a red mat."

WRAPPED = [
    f"<think>The picture has a cat.</think>{CAT}",
    f"<think>\nOne.\n\n</think>\n\n{CAT}",
    f"<think></think>\n{CAT}",
    f"<think>a <think>b</think> c</think> {CAT}",
    f"There is a cat, I think.\n</think>\n\n{CAT}",
    f"<THINKING>hm</THINKING>{CAT}",
    f"<reasoning>hm</reasoning>{CAT}",
    f"[THINK]hm[/THINK]{CAT}",
    f"<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>{CAT}<|END_RESPONSE|>",
    f"<scratchpad>hm</scratchpad>{CAT}",
    f"<s>[INST] Describe it. [/INST] {CAT}</s>",
    f"USER: Describe it. ASSISTANT: {CAT}",
    f"◁think▷hm◁/think▷{CAT}",
    f"<|begin_of_thought|>hm<|end_of_thought|>{CAT}",
    f"{CAT} <think>Is it red? Let me look aga",
    f"<think>hm</think><answer>{CAT}</answer>",
    f"<think>hm</think><answer>{CAT}",
    f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>{CAT}"
    "<|return|>",
    f"analysisThe user asks for a caption.assistantfinal{CAT}",
    f"<|channel>thought\nhm<channel|>{CAT}<turn|>",
    f"{CAT}<|im_end|>",
    f"{CAT}<|im_end|>\n<|im_start|>user\nAnd the mat?<|im_end|>",
    f"<|im_start|>assistant\n{CAT}<|im_end|>\n<|endoftext|>",
    f"<|start_header_id|>assistant<|end_header_id|>\n\n{CAT}<|eot_id|>",
    f"<start_of_turn>model\n{CAT}<end_of_turn>",
    f"<s> {CAT}</s>",
    f"[INST] [/INST] {CAT}</s>",
    f"<|assistant|>\n{CAT}<|end|>",
    f"{CAT}<｜end▁of▁sentence｜>",
    f"{CAT}<end_of_utterance>",
    f"{CAT}<pad><pad><pad>",
    f"<|vision_start|><|image_pad|><|vision_end|>{CAT}",
    f"ASSISTANT: {CAT}",
    f"{CAT}\nUSER: What else?",
    f"<image>\n{CAT}",
    "<ref>A cat</ref><box>(12,34),(56,78)</box> sits on <ref>a red mat</ref>"
    "<box>[[1, 2, 3, 4]]</box>.",
    "<|object_ref_start|>A cat<|object_ref_end|><|box_start|>(12,34),(56,78)<|box_end|> sits on a "
    "red mat.",
    "A cat(12,34),(56,78) sits on a red mat.",
    "A cat [[120,230,340,450]] sits on a red mat.",
    "<|ref|>A cat<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|> sits on a red mat.",
    "<grounding><phrase>A cat</phrase><object><patch_index_0044><patch_index_0863></object> sits "
    "on a red mat.",
    "A cat<loc_12><loc_34><loc_56><loc_78> sits on a red mat.",
    '<point x="61.5" y="40.4" alt="cat">A cat</point> sits on a red mat.',
    f"<|begin_of_box|>{CAT}<|end_of_box|>",
    f"```\n{CAT}\n```",
    f"```markdown\n{CAT}\n```",
    f"Here is the caption:\n```text\n{CAT}\n```",
    f"`{CAT}`",
    f"```\n{CAT}",
    f'{{"caption": "{CAT}"}}',
    f'```json\n{{"caption": "{CAT}", "objects": ["cat", "mat"]}}\n```',
    f'{{"description": {{"text": "{CAT}"}}}}',
    f'["{CAT}"]',
    f'[{{"caption": "{CAT}"}}]',
    f'"{CAT}"',
    f"{{'caption': '{CAT}'}}",
    f'```json\n{{"caption": "{CAT}',
    f'{{"Image Caption": "{CAT}"}}',
    f"<caption>{CAT}</caption>",
    f"\\boxed{{{CAT}}}",
    f'<think>hm</think>\n```json\n{{"caption": "{CAT}"}}\n```<|im_end|>',
]


@pytest.mark.parametrize("text", WRAPPED)
def test_the_caption_is_found(text):
    assert answer(text) == CAT
    assert no_caption(text)


NONE = [
    "<think>The user wants a caption. First, the cat is",
    "<think>hm</think>",
    "</think>",
    "<think>",
    "I see a cat, so I will say so.</think>",
    "<|channel|>analysis<|message|>The user",
    "<|im_end|>",
    '{"caption": "N/A"}',
    "None.",
    "<|endoftext|><|endoftext|>",
    "```\n```",
    "{}",
    "[]",
    '[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]',
    '{"boxes": [[1, 2, 3, 4]',
    "<box>(12,34),(56,78)</box>",
    "(12,34),(56,78)",
    "<loc_12><loc_34>",
    "...",
    '<tool_call>{"name": "zoom"}</tool_call>',
    "Okay, the user wants a short caption of this picture. Let me see.",
    "Got it, let's see what is in the picture. First",
    "So, I need to describe the image in one sentence.",
]


@pytest.mark.parametrize("text", NONE)
def test_no_caption_is_a_counted_reject(text):
    assert answer(text) == ""
    counts: Counter[str] = Counter()
    found = finish([Caption(text, "x", "1")], (), counts)
    assert isinstance(found, Refused)
    assert found.reason == "no-caption"
    assert counts["no captions"] == 1


ORDINARY = [
    CAT,
    "The image features a cat. Overall, the scene is calm.",
    "A sign says <3 and 5 > 4, and I <heart> it.",
    "A board with the numbers (1, 2) and [3].",
    'Two clocks show 10:30, and a poster reads "Think!" in red.',
    "A user sits at a desk; the assistant stands.",
    "a cat on a mat , next to a dog .",
    "a [framed] picture (of a fox)",
    "The user interface of a phone.",
    "Let's Dance is written on a poster.",
    "A thinker's statue, `Le Penseur`, in bronze.",
    "Ein Füchschen 狐狸 🦊 – ruhig.",
    "The analysis of a final score on a whiteboard.",
    "A tag that reads <EXIT>.",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_captions_stay_as_they_are(text):
    assert answer(text) == text
    counts: Counter[str] = Counter()
    assert finish([Caption(text, "x", "1")], (), counts) == [Caption(text, "x", "1")]
    assert not +counts


PIECES = [CAT, "<think>", "</think>", "<|im_end|>", "```", '{"caption": "', '"}', "<box>", "["]
PIECES += ["(1,2),(3,4)", "</box>", "\n", "<answer>", "final", "analysis", "assistant", "`", '"']


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(PIECES),
        max_size=8,
    ).map("".join)
    | st.text(max_size=60)
)
def test_it_is_idempotent_and_takes_any_text(text):
    found = answer(text)
    assert answer(found) == found


def test_of_several_captions_the_good_ones_stay():
    counts: Counter[str] = Counter()
    given = [Caption("<think>cut", "x", "1"), Caption(f"<think>a</think>{CAT}", "x", "1", number=1)]
    found = finish(given, (), counts)
    assert isinstance(found, list)
    assert [(caption.text, caption.number) for caption in found] == [(CAT, 1)]
    assert counts == {"no captions": 1, "unwrapped": 1, "truncated": 0}


def test_a_servers_thoughts_in_parts_are_no_text():
    body = (
        b'{"choices": [{"message": {"content": [{"type": "thinking", "text": "hm"},'
        b' {"type": "text", "text": "A cat."}]}}]}'
    )
    assert read(body).text == "A cat."

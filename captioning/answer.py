"""What a vision-language model writes, as the caption that is meant: without its thoughts, its
chat format's tokens, boxes, code fences and JSON. All of it that is none of a caption is "".
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from captioning.clean import PASSES, one_line

_FLAGS = re.IGNORECASE | re.DOTALL
_THINK = (
    r"(?:think|thinking|thoughts?|reasoning|reflection|reason|scratchpad|analysis|seed:think"
    r"|tool_call)"
)
#: How thoughts begin and end: XML, Mistral's, Kimi's, Skywork's and Cohere's, Gemma's channel.
_OPEN = (
    rf"<{_THINK}\b[^<>]*>|\[THINK\]|◁think▷|<\|(?:start_|begin_of_){_THINK}\|>|<\|channel>thought"
)
_CLOSE = rf"</{_THINK}>|\[/THINK\]|◁/think▷|<\|end_(?:of_)?{_THINK}\|>|<channel\|>"
_THOUGHT = re.compile(rf"(?:{_OPEN})(?:(?!{_OPEN}).)*?(?:{_CLOSE})", _FLAGS)
_THOUGHT_ENDS = re.compile(rf"^.*(?:{_CLOSE})", _FLAGS)  # a prompt may have begun it
_THOUGHT_BEGINS = re.compile(rf"(?:{_OPEN}).*$", _FLAGS)  # and max_tokens cut it off
_HARMONY = re.compile(r"^.*(?:<\|channel\|>|assistant)final(?:<\|message\|>)?", re.DOTALL)
_HARMONY_THOUGHT = re.compile(r"^(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)\b")
#: A thought that no tag announces.
_ALOUD = re.compile(
    r"(?:(?:okay|ok|alright|all right|hmm+|got it|wait|so|first|now|well)[,.!:… ]+)*"
    r"(?:the user (?:wants|is|has|asks|asked|needs|provided|gave)\b|i (?:need|have) to\b|i should\b"
    r"|(?:let me|let['’]s) (?:think|see|start|look|break|analy[sz]e|tackle|figure|check)\b"
    r"|we (?:need to|are asked)\b|my task is\b)",
    re.IGNORECASE,
)

_TURN = "im_end|eot_id|eom_id|end|endoftext|end_of_text|end_of_turn|eot|return|call|eos|turn_end"
#: Where a turn ends or another begins: what follows is no part of the answer.
_NEXT = re.compile(
    rf"<\|(?:{_TURN})\|>|</s>|<eos>|<end_of_turn>|<turn\|>|<end_of_utterance>|<｜end▁of▁sentence｜>"
    r"|<\|(?:im_start\|>|start_header_id\|>)?(?:user|system|human)\b|<start_of_turn>user"
    r"|(?:^|\n)\s*(?:user|human|\[INST\])\s*:",
    re.IGNORECASE,
)
_ROLE = r"(?:assistant|model|gpt|bot|ai)"
#: What an answer begins with where the template's own beginning is written once more.
_BEGINNING = re.compile(
    rf"^(?:<\|(?:im_start|start|start_header_id|turn)\|?>\s*{_ROLE}(?:<\|end_header_id\|>)?"
    rf"|<start_of_turn>\s*{_ROLE}|<\|{_ROLE}\|>|\[/INST\]|{_ROLE}\s*(?::|\n))\s*",
    re.IGNORECASE,
)
#: The prompt, written once more before the answer.
_ECHO = re.compile(
    r"^\s*(?:<s>|<bos>)?\s*(?:\[INST\].*?\[/INST\]|(?:user|human)\s*:.*?\bassistant\s*:)", _FLAGS
)
#: What programs write where there is nothing.
_NOTHING = re.compile(r"(?:null|none|nil|n/a|nan|undefined|true|false)\W*", re.IGNORECASE)
_NUMBERS = r"[\d\s,.;()\[\]{}%-]"
_GROUND = r"box|quad|det|bbox|object|polygon|coords?|location"
#: Places in the picture, with the tags around them.
_PLACES = re.compile(
    rf"<\|?(?:{_GROUND})(?:_start)?\|?>(?:{_NUMBERS}|<[a-z_]{1, 20}\d+>)*"
    rf"<(?:/(?:{_GROUND})|\|(?:{_GROUND})_end\||\|/(?:{_GROUND})\|)>"
    r"|<[a-z]+(?:_[a-z]+)*_?\d+>"  # <loc_12>, <seg001>, <patch_index_0044>
    r"|[(\[]\s*\d+(?:\.\d+)?\s*,\s*\d+(?:\.\d+)?\s*[)\]]\s*,\s*"
    r"[(\[]\s*\d+(?:\.\d+)?\s*,\s*\d+(?:\.\d+)?\s*[)\]]"  # (12,34),(56,78)
    r"|\[?\[\s*\d+(?:\.\d+)?(?:\s*,\s*\d+(?:\.\d+)?){3,}\s*\]\]?",  # [[12,34,56,78]]
    re.IGNORECASE,
)
#: Tokens of chat templates that are no text, and tags around words that stay.
_TOKENS = re.compile(
    r"<\|[^|<>\n]{1,60}\|?>|<[a-z_]{1,40}\|>|<｜[^｜<>\n]{1,60}｜>|<0x[0-9a-f]{2}>"
    r"|</?(?:s|bos|eos|pad|unk|mask|sep|cls|image|img|video|br|p|grounding|phrase|ref|box|quad"
    r"|start_of_\w+|end_of_\w+|image_\w+|img_\w+|fake_token_around_image|row_\d+_col_\d+"
    r"|global-img|unused\d*|answer|caption|description|output|response|final|text|points?)"
    r"(?:\s[^<>]*)?/?>|\[/?(?:INST|IMG|IMG_BREAK|IMG_END|ANSWER)\]|<</?SYS>>",
    re.IGNORECASE,
)
_WRAPPED = re.compile(
    r"<(answer|caption|description|output|response|final_answer|final)>(.*?)(?:</\1>|$)", _FLAGS
)
_FENCE = re.compile(r"```[\w+-]*[ \t]*\n?(.*?)(?:```|$)", _FLAGS)
_BOXED = re.compile(r"^\$*\\boxed\{(?:\\text\{)?(.*?)\}*\$*$", re.DOTALL)
_NAMES = (
    *("caption", "description", "answer", "text", "response", "output", "content", "result"),
    *("detailed_caption", "long_caption", "short_caption", "image_caption", "image_description"),
    *("final_answer", "summary", "message"),
)
#: An object that max_tokens cut off in its caption.
_CUT_JSON = re.compile(rf'^\{{\s*"(?:{"|".join(_NAMES)})"\s*:\s*"((?:[^"\\]|\\.)*)$', _FLAGS)


def answer(text: str) -> str:
    """The caption in what a model wrote, in one line; "" where there is none. Idempotent."""
    line = ""
    for _ in range(PASSES):
        line = one_line(_unpacked(_without_tokens(_without_thoughts(text.strip()))))
        if line == text:
            break
        text = line
    said = any(map(str.isalnum, line)) and not _NOTHING.fullmatch(line)
    return line if said and not _ALOUD.match(line) else ""


def _without_thoughts(text: str) -> str:
    if "final" in text:
        text = _HARMONY.sub("", text) if _HARMONY_THOUGHT.match(text) else _spoken(text)
    elif _HARMONY_THOUGHT.match(text):
        return ""
    while (shorter := _THOUGHT.sub(" ", text)) != text:  # they may lie in each other
        text = shorter
    text = _THOUGHT_ENDS.sub("", text)
    return _THOUGHT_BEGINS.sub("", text)


def _spoken(text: str) -> str:
    """Harmony's format whose special tokens were skipped: "analysis…assistantfinal…"."""
    return _HARMONY.sub("", text) if re.match(r"analysis\S", text) else text


def _without_tokens(text: str) -> str:
    text = _ECHO.sub("", text)
    while (shorter := _BEGINNING.sub("", text).strip()) != text:
        text = shorter
    for end in _NEXT.finditer(text):
        if before := _TOKENS.sub(" ", text[: end.start()]).strip():
            text = before if "<" not in text[: end.start()] else text[: end.start()]
            break
    if found := _WRAPPED.search(text):
        text = found[2]
    text = _PLACES.sub(_GAP, text.replace(_GAP, " "))
    return _GAPS.sub(_filled, _TOKENS.sub(_GAP, text))


_GAP = "\0"  # where a tag was
_GAPS = re.compile(rf"[ \t]?{_GAP}[ \t{_GAP}]*")


def _filled(gap: re.Match[str]) -> str:
    """Nothing before a stop, else one space."""
    return "" if gap.string[gap.end() : gap.end() + 1] in tuple(".,;:!?") else " "


def _unpacked(text: str) -> str:
    """Out of a code fence, \\boxed{}, or JSON."""
    if found := _FENCE.search(text):
        around = (text[: found.start()] + text[found.end() :]).strip()
        whole = not around or around.endswith(":")
        text = found[1].strip() if whole else text.replace("```", " ")
    if len(text) > 2 and text[0] == text[-1] == "`" and "`" not in text[1:-1]:
        text = text[1:-1]
    if found := _BOXED.match(text):
        text = found[1]
    if text[:1] in ("{", "[") or (text[:1] == '"' == text[-1:]):
        return _from_json(text)
    return text


def _from_json(text: str) -> str:
    if found := _CUT_JSON.match(text):
        text = f'{{"caption": "{found[1]}"}}'
    for parse in (lambda t: json.loads(t, strict=False), ast.literal_eval):
        try:
            return _said(parse(text))
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    # Broken: no caption begins so, and text in brackets is text.
    return "" if re.match(r'[\[{]+\s*["\'][\w ]+["\']\s*:', text) else text


def _said(value: Any) -> str:
    """The caption in a value out of JSON; "" where none of it is one."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return (
            " ".join(filter(None, map(_said, value)))
            if len(value) == 1 or all(isinstance(item, str) for item in value)
            else ""
        )
    if isinstance(value, dict):
        named = {str(k).lower().replace(" ", "_"): v for k, v in value.items()}
        for name in _NAMES:
            if name in named and (found := _said(named[name])):
                return found
        if len(value) == 1:
            return _said(next(iter(value.values())))
    return ""

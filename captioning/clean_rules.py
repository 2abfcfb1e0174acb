"""The table behind captioning.clean: what is taken out of a caption, why, and an example each.

What the DeepFloyd cleaning does, which the official code applies to CC12M, in its order but for
`mend`, written anew: no pattern takes exponential time, and all hold for either case.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_plus

import ftfy


@dataclass(frozen=True)
class Rule:
    """Patterns ignore case. A rule that no pattern can express is a function."""

    pattern: str | Callable[[str], str]
    replacement: str
    why: str
    example: tuple[str, str]  # before, after this rule alone

    def apply(self, text: str) -> str:
        if callable(self.pattern):
            return self.pattern(text)
        return re.sub(self.pattern, self.replacement, text, flags=re.IGNORECASE)


_FORMATS = "png|jpe?g|bmp|webp|eps|pdf|apk|mp4"
_HOSTS = "com|co|ru|net|org|edu|gov|it"
_DASHES = (
    "\u058a\u05be\u1400\u1806\u2010-\u2015\u2212\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
# Strokes, phonetic katakana, enclosed, compatibility, extension A, hexagrams, unified ideographs.
_CJK = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"


def unquote(text: str) -> str:
    """URL escapes until none is left: each level would otherwise take a pass over all rules."""
    while (plain := unquote_plus(text)) != text:
        text = plain
    return text


def many_hyphens(text: str) -> str:
    """A file's name in place of a caption: more than three hyphens or underscores."""
    return re.sub(r"[-_]", " ", text) if len(re.findall(r"[-_]", text)) > 3 else text


def mend(text: str) -> str:
    """Mojibake, ligatures, control characters; entities are left to the rules about them."""
    return ftfy.fix_text(text, unescape_html=False)


def unescape_twice(text: str) -> str:
    return html.unescape(html.unescape(text))


RULES: tuple[Rule, ...] = (
    # The official code mends at a later place, where the signs of mojibake are already gone.
    Rule(mend, "", "text that was decoded wrongly", ("cafÃ© &lt;", "café &lt;")),
    Rule(unquote, "", "captions taken from URLs", ("red+fox%20cub", "red fox cub")),
    Rule(str.lower, "", "as encoders were trained; an option", ("A Fox", "a fox")),
    Rule("<person>", "person", "CC12M's stand-in for names", ("<PERSON> at sea", "person at sea")),
    Rule(
        r"\b(?:https?|www):[/\\]*[^\s/\\]\S*",
        "",
        "links with a scheme",
        ("fox https://a.b/c?d=e cub", "fox  cub"),
    ),
    Rule(
        rf"(?<![a-z0-9.-])(?:[a-z0-9-]++\.)+(?:{_HOSTS})\b(?!@)(?:/\S*)?",
        "",
        "links that are a bare host, with or without a path",
        ("see shop.example.com/fox now", "see  now"),
    ),
    Rule(
        r"<!--.*?-->|<(script|style)\b[^>]*>.*?</\1>|</?[a-z][^<>]*>",
        "",
        "HTML",
        ('a <b class="x">red</b> fox', "a red fox"),
    ),
    Rule(html.unescape, "", "entities", ("fox &lt;3 cub", "fox <3 cub")),
    Rule(r"@\w+", "", "accounts", ("fox by @someone", "fox by ")),
    Rule(rf"[{_CJK}]+", "", "Chinese characters among Latin ones", ("fox 狐狸", "fox ")),
    Rule(rf"[{_DASHES}]", "-", "one kind of dash", ("a fox – at rest", "a fox - at rest")),
    Rule("[«»“”„‟″¨]", '"', "one kind of double quotes", ("a “fox”", 'a "fox"')),
    Rule("[‘’‚‛′`´]", "'", "one kind of single quotes", ("a fox’s den", "a fox's den")),
    Rule("&quot;?|&amp;?", "", "escaped quotes and ampersands", ("a &quot;fox&quot;", "a fox")),
    Rule(
        r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])",
        " ",
        "IP addresses",
        ("fox 10.0.0.1 cub", "fox   cub"),
    ),
    Rule(
        r"\s\d:\d\d\s*$", "", "a video's length at the end", ("fox cubs play 3:45", "fox cubs play")
    ),
    Rule(r"\\n", " ", "line ends that were written out", (r"fox\ncub", "fox cub")),
    Rule(r"#(?:\d{1,3}|\d{5,})\b", "", "numbers of a series and of orders", ("fox #12", "fox ")),
    Rule(r"\b\d{6,}\b", "", "numbers of stock pictures", ("fox 12345678", "fox ")),
    Rule(rf"(?<!\S)\S+\.(?:{_FORMATS})\b", "", "files", ("fox IMG-01.JPG", "fox ")),
    Rule(r"[\"']{2,}", '"', "quotes in a row", ("a ''fox\"", 'a "fox"')),
    Rule(r"\.{2,}", " ", "dots in a row", ("fox... cub", "fox  cub")),
    Rule(
        r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+",
        " ",
        "characters that decorate and say nothing",
        ("fox® (cub) | den", "fox   cub    den"),
    ),
    Rule(r"\s\.\s", " ", "a dot on its own", ("fox . cub", "fox cub")),
    Rule(many_hyphens, "", "names of files", ("red-fox-in_the-snow", "red fox in the snow")),
    Rule(unescape_twice, "", "HTML that was escaped twice", ("fox &amp;lt;3 cub", "fox <3 cub")),
    Rule(
        r"\b[a-z]{1,3}\d{3,15}\b|\b[a-z]++\d++[a-z]+\b|\b\d++[a-z]++\d+\b",
        "",
        "names that cameras and shops give",
        ("fox dsc0123 a1b 4k60", "fox   "),
    ),
    Rule(
        r"\b(?:worldwide )?(?:free )?shipping\b|\b(?:free )?download(?: free)?\b"
        r"|\bclick (?:for|on) \w+",
        "",
        "what shops say",
        ("fox print free shipping click for price", "fox print  "),
    ),
    Rule(
        rf"\b(?:{_FORMATS})(?: images?)?\b",
        "",
        "kinds of files",
        ("fox png images", "fox "),
    ),
    Rule(r"\bpage \d+\b", "", "places in a document", ("foxes page 12", "foxes ")),
    Rule(
        r"\b[a-z]*+\d++[a-z]++\d[a-z\d]*+\b", " ", "longer names like that", ("fox a1b2c3", "fox  ")
    ),
    Rule(r"\b\d+[x×х]\d+\b", "", "sizes", ("fox 1920x1080", "fox ")),
    Rule(r"\b\s+:\s+", ": ", "a colon stands at the word before it", ("fox : cub", "fox: cub")),
    Rule(r"(\D[,./])\b", r"\1 ", "a space after a comma or stop", ("fox,cub", "fox, cub")),
    Rule(r"\s+", " ", "one space", ("fox \n cub", "fox cub")),
    Rule(r"^([\"'])([\w\W]+)\1$", r"\2", "quotes around it all", ('"red fox"', "red fox")),
    Rule(r"^['_,\-:;]+|['_,\-:+]+$", "", "what is left at the ends", ("- red fox,", " red fox")),
    Rule(r"^\.\S+$", "", "a file's ending and no more", (".jpeg", "")),
    Rule(str.strip, "", "no space at the ends", (" fox ", "fox")),
)

_PICTURE = "(?:image|picture|photo(?:graph)?|scene)"
_THERE = "there (?:is|are) |(?:we|you|one) can see "
_SHOWS = "(?:features|shows|depicts|displays|captures|presents|portrays|contains|showcases)"

#: What LLaVA and its like say around the description itself.
HABITS: tuple[Rule, ...] = (
    Rule(
        r"^(?:sure|certainly|of course)\b(?:[,!.:]+\s+(?:here(?:['’]s| is) [^:]{0,60}:\s*)?"
        r"|\s+here(?:['’]s| is) [^:]{0,60}:\s*)",
        "",
        "an assistant's politeness",
        ("Sure! Here is a caption: A fox rests.", "A fox rests."),
    ),
    Rule(
        r"^(?:caption|description|answer|assistant)\s*:\s*",
        "",
        "a label",
        ("Caption: A fox rests.", "A fox rests."),
    ),
    Rule(
        rf"^(?:the|this) {_PICTURE} (?:also )?{_SHOWS} ",
        "",
        "that it is an image goes without saying",
        ("The image features a fox.", "a fox."),
    ),
    Rule(
        rf"^(?:this is|here is|the {_PICTURE} is|this {_PICTURE} is) (?:an?|the) {_PICTURE} "
        "(?:of|showing) ",
        "",
        "the same in other words",
        ("This is a picture of a fox.", "a fox."),
    ),
    Rule(
        rf"^(?:the|this) {_PICTURE} is ((?:an?|the) )",
        r"\1",
        "what kind of picture it is stays",
        ("The image is a painting of a fox.", "a painting of a fox."),
    ),
    Rule(
        rf"^in (?:the|this) {_PICTURE}(?:, (?:{_THERE})?| (?:{_THERE}))",
        "",
        "where else",
        ("In the image, there is a fox.", "a fox."),
    ),
    Rule(
        r"(?<=[.!?])\s+(?:overall,?|the overall) [^.!?]*[.!?]?$",
        "",
        "a verdict at the end repeats what was said",
        ("A fox rests. Overall, the scene is calm.", "A fox rests."),
    ),
)

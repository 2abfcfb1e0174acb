"""File names in a table that point where they should not; each next to a good row."""

from __future__ import annotations

from tests.hostile.case import SAMPLE, Case


def _of(name: str):
    return lambda: name.encode()


REFUSED = "refused"
CASES: list[Case] = [
    Case("up", REFUSED, "one folder up", _of("../secret.jpg")),
    Case("down-and-up", REFUSED, "down, and further up", _of("good/../../secret.jpg")),
    Case("absolute", REFUSED, "an absolute path", _of("/etc/hostname")),
    Case("backslash", REFUSED, "Windows' way up", _of("..\\secret.jpg")),
    Case("file-url", REFUSED, "file://", _of("file:///etc/hostname")),
    Case("http-url", REFUSED, "http://", _of("http://169.254.169.254/latest/meta-data/")),
    Case("nul", REFUSED, "NUL inside", _of("good.jpg\0.png")),
    Case("dots", REFUSED, "nothing but dots", _of("..")),
    Case("link-out", REFUSED, "a link to a file outside", _of("link-out.jpg")),
    Case(
        "link-folder", REFUSED, "through a link to a folder outside", _of("link-folder/secret.jpg")
    ),
    Case("device", REFUSED, "a link to /dev/zero", _of("zero.jpg")),
    Case("fifo", REFUSED, "a FIFO that nobody writes to", _of("fifo.jpg")),
    Case("folder", REFUSED, "a folder", _of("folder.jpg")),
    Case("link-nowhere", "failed_to_download", "a link to nothing", _of("link-nowhere.jpg")),
    Case("link-loop", "failed_to_download", "a link to itself", _of("link-loop.jpg")),
    Case("gone", "failed_to_download", "no such file", _of("gone.jpg")),
    Case("long", "failed_to_download", "5,000 letters", _of("a" * 5000 + ".jpg")),
    Case("empty", "failed_to_download", "no name", _of("")),
    Case("huge", "too-large", "1 TB, all holes", _of("huge.jpg")),
    Case("link-in", SAMPLE, "a link inside the folder", _of("link-in.jpg")),
    Case("roundabout", SAMPLE, "down and up again", _of("good/../roundabout.jpg")),
    Case("newline", SAMPLE, "a newline in the name", _of("two\nlines.jpg")),
    Case("unicode", SAMPLE, "composed and decomposed letters", _of("cafe\u0301 é 猫.jpg")),
    Case("percent", SAMPLE, "what a URL would decode", _of("%2e%2e%2fgood.jpg")),
    Case("option", SAMPLE, "what a shell would take for an option", _of("--help.jpg")),
]

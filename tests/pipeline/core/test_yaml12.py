"""YAML 1.2 where PyYAML reads 1.1."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.core.errors import SettingError
from pipeline.core.yaml12 import parse, parse_arguments

SAME = object()
BOMB = "0: &0 [x]\n" + "".join(
    f"{n + 1}: &{n + 1} [{', '.join([f'*{n}'] * 9)}]\n" for n in range(30)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, SAME) for word in ("on", "off", "yes", "No", "y", "12:30", "1:2:3", "1_000")),
        *((word, SAME) for word in ("0b11", "0o8", "1e", "e4", "2024-01-01", "=", "tRue", ".")),
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, None) for word in ("", "~", "null", "NULL")),
        ("0100", 100),
        ("-07", -7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-4", 1e-4),
        ("-2E3", -2000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ('"1e-4"', "1e-4"),
        ("!!int 0100", 100),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    expected = text if value is SAME else value
    found = parse(f"key: {text}", "x.yaml")["key"]
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize("key", ["on", "yes", "0100", "1e3", "12:30", "null", "~", "1_000", "3.0"])
def test_a_key_is_the_word_that_was_written(key: str) -> None:
    assert parse(f"{key}: 1\nx: {{{key}: 2}}", "x.yaml") == {key: 1, "x": {key: 2}}


def test_merged_keys_may_be_overridden() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}"
    assert parse(text, "x.yaml")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: key a is there twice"),
        ("a: {on: 1, on: 2}", "line 1: key on is there twice"),
        ("1: a\n'1': b", "line 2: key 1 is there twice"),
        ("? [a]\n: 1", "line 1: a key has to be a word"),
        ("a: [", "line 1: while parsing"),
        ("a: &a\n  b: *a", "its aliases (*name) never end"),
        (BOMB, "or stand for too many values"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: !!int x", "invalid literal"),
        ("a: *b", "found undefined alias"),
        ("a: \x01", "special characters are not allowed"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_what_is_refused_in_a_line(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=r"^x\.yaml: not YAML: ") as error:
        parse(text, "x.yaml")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, text) for text in ("on", "12:30", "a #3", "#3", "@x", "%x", "a: b", "- x", "&x")),
        *((text, text) for text in ("!x", "*x", "a=b", "~/x", "1_000", "what?", "x{y}", "`x`")),
        ("0100", 100),
        ("1e-4", 1e-4),
        ("false", False),
        ("", None),
        ("null", None),
        ("[1, on, {a: 0100}]", [1, "on", {"a": 100}]),
        ("{on: 1}", {"on": 1}),
        ("'1e-4'", "1e-4"),
    ],
)
def test_arguments(text: str, value: Any) -> None:
    assert parse_arguments([f"a.0100.on={text}", "a.b=1"]) == {"a": {"0100": {"on": value}, "b": 1}}


@pytest.mark.parametrize("argument", ["=5", "a.=5", ".a=5", "a..b=5", "a=[", "a={x: 1, x: 2}"])
def test_arguments_that_are_refused(argument: str) -> None:
    with pytest.raises(SettingError) as error:
        parse_arguments([argument])
    assert str(error.value).startswith(argument)


def test_a_sources_file(tmp_path: Any) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("source: webdataset\ndownload: {urls: on, on: 1}\nencode: {batch_size: 0100}")
    config = load_config(None, path, {})
    assert config.download == {"urls": "on", "on": 1}
    assert config.encode.batch_size == 100
    path.write_text("source: webdataset\nsource: urls")
    with pytest.raises(SettingError, match=r"--config .*x\.yaml: not YAML: line 2: key source is"):
        load_config(None, path, {})

"""YAML as version 1.2 reads it: `on`, `yes` and `12:30` are text, `0100` is a hundred, `1e-4` a
number. A key is the word that was written, and may not come twice in one mapping.

PyYAML reads version 1.1, in which they are True, 750, 64 and text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from pipeline.core.errors import SettingError

_VALUES = 100_000  # of a file, at most
_NULLS = ("", "~", "null", "Null", "NULL")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key has to be a word", key.start_mark
                )
            if key.value in seen:
                problem = f"key {key.value} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
            if key.tag != _MERGE:
                key.tag = _TEXT
        return super().construct_mapping(node, deep)


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, where: object) -> Any:
    """What a file holds.

    Raises:
        SettingError: no YAML; says where it is wrong. `where` names the file.
    """
    try:
        found = yaml.load(text, _Loader)
        if not _is_tree(found):
            raise ValueError("its aliases (*name) never end, or stand for too many values")
        return found
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        said = " ".join(filter(None, (error.context, error.problem)))
        raise SettingError(f"{where}: not YAML: {line}{said}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise SettingError(f"{where}: not YAML: {said}") from error


def _is_tree(found: Any) -> bool:
    """Whether it ends, with each alias written out."""
    left, count = [found], 0
    while left and count < _VALUES:
        value, count = left.pop(), count + 1
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
    return count < _VALUES


def parse_value(text: str, where: object) -> Any:
    """What is behind KEY= in an argument: as in a file, but text may hold what YAML gives a meaning
    (`runs/x #3`, `@x`, `a: b`)."""
    text = text.strip()
    if text in _NULLS:
        return None
    if text[0] in "[{'\"":
        return parse(text, where)
    try:
        value = parse(text, where)
    except SettingError:
        return text
    return value if isinstance(value, bool | int | float) else text


def parse_arguments(arguments: list[str]) -> dict[str, Any]:
    """`dotted.key=value`, one after the other, as nested mappings; a later one wins.

    Raises:
        SettingError: an argument without a key, or whose value is no YAML.
    """
    result: dict[str, Any] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        *path, last = name.split(".")
        if not all((*path, last)):
            raise SettingError(f"{argument}: write dotted.key=value, for example data.workers=4")
        section = result
        for key in path:
            inner = section.get(key)
            section[key] = section = inner if isinstance(inner, dict) else {}
        section[last] = parse_value(text, argument)
    return result

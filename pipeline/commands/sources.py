"""`pipeline sources`: the settings of a source, as its class declares them, for `--set`.

Names, types and defaults are pydantic's; what a setting means is the comment beside it in the
class, or above it ("#: "), so that it is written once, where whoever changes it sees it.
"""

from __future__ import annotations

import ast
import inspect
import io
import pkgutil
import textwrap
import tokenize
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.core.errors import SettingError, nearest
from pipeline.sources import SOURCES


class Setting(NamedTuple):
    name: str
    default: str  # "required" where there is none
    meaning: str


def settings(source: str) -> list[Setting]:
    """What `--set KEY=VALUE` takes, in the order of declaration, a source's own before those that
    it has in common with others.

    Raises:
        SettingError: no such source.
    """
    cls = _class(source)
    meanings: dict[str, str] = {}
    own: list[str] = []
    for part in cls.__mro__:
        if part is not BaseModel and isinstance(part, type) and issubclass(part, BaseModel):
            found = _comments(part)
            own += [name for name in found if name not in own]
            meanings = found | {name: text for name, text in meanings.items() if text}
    return [
        Setting(name, _default(cls.model_fields[name]), _choices(cls, name) + meanings[name])
        for name in own
        if name in cls.model_fields
    ]


def about(source: str) -> str:
    """The first sentence of a source's own documentation."""
    text = inspect.getdoc(inspect.getmodule(_class(source))) or ""
    return " ".join(text.split("\n\n")[0].split())


def _class(source: str) -> type[BaseModel]:
    if source not in SOURCES:
        raise SettingError(
            f"sources {source}: unknown{nearest(source, SOURCES)}; known: {', '.join(SOURCES)}"
        )
    return pkgutil.resolve_name(SOURCES[source])


def _choices(cls: type[BaseModel], name: str) -> str:
    kind = cls.model_fields[name].annotation
    return f"{' or '.join(map(str, get_args(kind)))}; " if get_origin(kind) is Literal else ""


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _comments(cls: type) -> dict[str, str]:
    """Field -> the comment above it that begins with "#:", and those on its own lines."""
    source = textwrap.dedent(inspect.getsource(cls))
    found: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# noqa"):
            found[token.start[0]] = token.string
    lines = source.splitlines()
    comments = {}
    for node in (node for part in ast.parse(source).body for node in ast.iter_child_nodes(part)):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        first, last = node.lineno, node.end_lineno or node.lineno
        above = first - 1
        while found.get(above, "").startswith("#:"):
            above -= 1
        while lines[last : last + 1] and lines[last].lstrip().startswith("# "):
            last += 1  # a comment that goes on below its field
        texts = [found[n].lstrip("#: ") for n in range(above + 1, last + 1) if n in found]
        texts = [text for text in texts if not text.startswith(("pyright:", "type:"))]
        comments[node.target.id] = " ".join(texts).partition("  # pyright")[0]
    return comments

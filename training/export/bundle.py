"""A module and every file of ours that it imports -> a folder's own code.

The files are the package's, but for their import lines, so that exported code cannot differ from
what trained. diffusers 0.39 copies a local module and the files that it names itself in relative
imports, not those that these import in turn: hence the start module names all of them. They lie in
a subfolder that bears a hash of them, because diffusers keeps all local code in one cache folder.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path

OWN = ("training", "pipeline", "captioning")
LIBRARIES = ("torch", "numpy", "PIL", "diffusers", "transformers", "ftfy")
"""What exported code may import beside Python's own modules."""

_TABLE_ENTRY = re.compile(rf"({'|'.join(OWN)})(\.\w+)+:\w+")
_HEADER = "# Written by `python -m training.convert export`. SPDX-License-Identifier: Apache-2.0\n"


class CannotBundle(ValueError):
    """Code that would not work outside this package."""


def bundle(start: str, name: str) -> dict[str, str]:
    """The files for a folder, by path: NAME.py, and NAME_HASH/… of what it imports.

    Args:
        start: a module of ours, e.g. "training.export.transformer".
        name: what to call it in the folder.

    Raises:
        CannotBundle: a module imports what the folder's users need not have, or names a module of
            ours in a way that cannot be followed.
    """
    modules = _imported(start)
    first = modules.pop(start)
    files = {_flat(module): _relative(module, text, ".") for module, text in modules.items()}
    digest = hashlib.sha256("".join(files[key] for key in sorted(files)).encode()).hexdigest()[:8]
    package = f"{name}_{digest}"
    top = _relative(start, first, f".{package}.")
    if files:
        top += "\n\n# diffusers copies the files that are named here, and no others.\n"
        top += "".join(f"from .{package}.{key} import __name__ as _  # noqa\n" for key in files)
    return {f"{name}.py": _HEADER + top} | {
        f"{package}/{key}.py": _HEADER + text for key, text in files.items()
    }


def _imported(start: str) -> dict[str, str]:
    """Source of a module and of all of ours that it imports, directly or not."""
    sources: dict[str, str] = {}
    left = [start]
    while left:
        module = left.pop()
        if module not in sources:
            sources[module] = _source(module)
            left += sorted(_wanted(module, sources[module]))
    return dict(sorted(sources.items()))


def _source(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise CannotBundle(f"{module}: no such module")
    return Path(spec.origin).read_text("utf-8")


def _wanted(module: str, text: str) -> set[str]:
    """Names of the modules of ours that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and _TABLE_ENTRY.fullmatch(str(node.value)):
            raise CannotBundle(f"{module}:{node.lineno}: {node.value} is imported by name alone")
        if isinstance(node, ast.Import):
            for alias in node.names:
                _check_library(module, node, alias.name)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                raise CannotBundle(f"{module}:{node.lineno}: a relative import; write it in full")
            if source.split(".")[0] not in OWN:
                _check_library(module, node, source)
                continue
            if any(find_spec(f"{source}.{alias.name}") for alias in node.names if _package(source)):
                raise CannotBundle(
                    f"{module}:{node.lineno}: imports a module of {source}; import its names"
                )
            found.add(source)
    return found


def _check_library(module: str, node: ast.stmt, name: str) -> None:
    top = name.split(".")[0]
    if top not in LIBRARIES and top not in sys.stdlib_module_names:
        raise CannotBundle(f"{module}:{node.lineno}: imports {name}; exported code may not")


def _package(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def _relative(module: str, text: str, prefix: str) -> str:
    """The module's text with imports of ours turned into imports of files beside it."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OWN:
            line, source = lines[node.lineno - 1], node.module or ""
            lines[node.lineno - 1] = line.replace(
                f"from {source} import", f"from {prefix}{_flat(source)} import", 1
            )
            if lines[node.lineno - 1] == line:
                raise CannotBundle(f"{module}:{node.lineno}: an import over several lines")
    return "".join(lines)


def _flat(module: str) -> str:
    return module.removeprefix("training.").replace(".", "_")

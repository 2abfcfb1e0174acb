"""Which of a run's processes this one is: what launchers say in the environment. No torch here.

Composer, streaming and torch read the same variables, each in its own way; here they are judged
once, before any of them.
"""

from __future__ import annotations

import os
import sys

from pipeline.core.errors import SettingError

#: What a launcher sets, beside MASTER_ADDR and MASTER_PORT; NODE_RANK follows from the others.
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ALL = (*NUMBERS, "NODE_RANK")


def settle() -> None:
    """Makes the variables whole, or takes away what was left in the shell by something else, with
    a line: one process trains then.

    Raises:
        SettingError: a launcher was at work, and left out something or contradicts itself.
    """
    if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
        stray = [f"{name}={os.environ[name]}" for name in _ALL if os.environ.get(name)]
        alone()
        if stray:
            print(
                f"train: {', '.join(stray)} in the environment, without both RANK and WORLD_SIZE: "
                "of no launcher, so ignored; one process trains (composer -n N starts N)",
                file=sys.stderr,
            )
        return
    if (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1"):
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0"}
        return
    for name in (*NUMBERS, "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise SettingError(f"RANK and WORLD_SIZE are set, {name} is not: {_REMEDY}")
    rank, world, local, per_node = map(number, NUMBERS)
    if not (rank < world and per_node > 0 and world % per_node == 0 and local == rank % per_node):
        shown = " ".join(f"{name}={os.environ[name]}" for name in NUMBERS)
        raise SettingError(f"{shown}: these do not fit each other; {_REMEDY}")
    os.environ["NODE_RANK"] = str(rank // per_node)  # torchrun says it under another name


def alone() -> None:
    """For commands that are one process: takes the variables away, whoever set them."""
    for name in _ALL:
        os.environ.pop(name, None)


def number(name: str) -> int:
    """
    Raises:
        SettingError: the variable is no whole number.
    """
    text = os.environ[name]
    if not text.isascii() or not text.isdigit():
        raise SettingError(f"{name}={text}: not a whole number; {_REMEDY}")
    return int(text)


def world_size() -> int:
    """Ranks of this run, as the launcher says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def first() -> bool:
    return os.environ.get("RANK", "0") == "0"


_REMEDY = f"start with composer or torchrun, or take them out of the shell: unset {' '.join(_ALL)}"

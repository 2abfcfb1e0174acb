"""The most memory that this process has held, as Linux tells it of the process itself.

`ru_maxrss` would not do: a program that was started begins with that of the one that started it.
"""

from __future__ import annotations

from pathlib import Path


def peak() -> int:
    """Bytes, since the process began or `forget` was called."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024


def forget() -> int:
    """Begins anew from what is held now, which it returns."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()

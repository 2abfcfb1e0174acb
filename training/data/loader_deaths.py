"""What it means that a loader process is gone: torch says the signal, here is what to do."""

from __future__ import annotations

import re

_KILLED = (
    "a loader process was killed by the system, most likely for want of memory (`dmesg` says so); "
    "fewer data.workers, a smaller batch_size, or more memory for the container"
)
_BUS = (
    "a loader process got SIGBUS: /dev/shm is full (docker run --shm-size=8g, or data.workers=0), "
    "or a shard was cut off while it was being read (`pipeline verify`)"
)


def explained(error: BaseException) -> str:
    """A line for an error that torch raises when a loader process has died; "" for any other."""
    text = str(error)
    if not re.search(r"DataLoader worker \(pid", text):
        return ""
    if "Bus error" in text:
        return _BUS
    if "Killed" in text or "exited unexpectedly" in text:
        return _KILLED
    return f"a loader process died: {' '.join(text.split())[:200]}"

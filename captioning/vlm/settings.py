"""How a vision-language model writes, and one caption that is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from captioning.captioner import BadSetting, Picture
from captioning.captioner import Settings as CommonSettings


@dataclass(frozen=True)
class Settings(CommonSettings):
    batch_size: int | Literal["auto"] = "auto"  # auto: 16 on a GPU (24 GB for 7B), 8 on a CPU
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU
    threads: int | None = None  # of torch on a CPU, part of what decides a text; None: as they are

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size != "auto" and self.batch_size < 1:
            raise BadSetting(f"batch_size={self.batch_size}: use 1 or more, or auto")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise BadSetting(f"{name}={getattr(self, name)}: use one of {', '.join(known)}")

    @property
    def batch(self) -> int:
        """Captions that are written at once."""
        if self.batch_size == "auto":
            return 16 if self.device == "cuda" else 8
        return self.batch_size

    @property
    def compute_dtype(self) -> str:
        if self.dtype == "auto":
            return "bfloat16" if self.device == "cuda" else "float32"
        return self.dtype

    def decisive(self) -> dict[str, Any]:
        own = {"batch_size": self.batch, "device": self.device, "dtype": self.compute_dtype}
        if self.device == "cpu":
            own["threads"] = self.threads
        return {**super().decisive(), **own}


_CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class Wanted:
    """One caption that is to be written: a row of a batch."""

    picture: Picture
    number: int

"""Encoders' config files, with the defaults of the classes that read them, and checked. No torch.

The libraries fill in what a file leaves out; so does what is told of an encoder without them. A
test compares the defaults here with the classes' own, and whoever loads weights compares the rest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.core.errors import SettingError

Count = Annotated[int, Field(strict=True, gt=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Scale = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class Config(BaseModel):
    """Fields that decide facts; a file has others, which are its class's business."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class AutoencoderKL(Config):
    """diffusers' class of this name."""

    class_name: Literal["AutoencoderKL"] = Field("AutoencoderKL", alias="_class_name")
    in_channels: Literal[3] = 3  # red, green, blue
    out_channels: Literal[3] = 3
    latent_channels: Count = 4
    block_out_channels: list[Count] = Field([64], min_length=1)
    down_block_types: list[str] | None = None
    up_block_types: list[str] | None = None
    scaling_factor: Scale = 0.18215
    shift_factor: Number | None = None
    # A mean and a spread for each channel are not applied anywhere: better none than half of it.
    latents_mean: None = None
    latents_std: None = None

    @model_validator(mode="after")
    def _as_many_blocks(self) -> AutoencoderKL:
        for name in ("down_block_types", "up_block_types"):
            kinds = getattr(self, name)
            if kinds is not None and len(kinds) != len(self.block_out_channels):
                count = len(self.block_out_channels)
                raise ValueError(f"{len(kinds)} {name} and {count} block_out_channels")
        return self

    def downsample(self) -> int:
        """Pixels a latent cell; each block but the last halves."""
        return 2 ** (len(self.block_out_channels) - 1)


class ClipText(Config):
    """transformers' CLIPTextConfig."""

    hidden_size: Count = 512
    max_position_embeddings: Count = 77


class Clip(Config):
    """transformers' CLIPConfig; its older `text_config_dict` replaces `text_config`."""

    text_config: ClipText | None = None
    text_config_dict: ClipText | None = None

    def text(self) -> ClipText:
        return self.text_config_dict or self.text_config or ClipText()


class T5(Config):
    """transformers' T5Config, MT5Config and UMT5Config."""

    d_model: Count = 512


class Tokenizer(Config):
    """A tokenizer_config.json."""

    model_max_length: Annotated[float, Field(gt=0)] | None = None  # 1e30: as long as you like


class OpenClipText(Config):
    """open_clip's CLIPTextCfg: CLIP's own text towers, causal and pooled at end-of-text. Elsewhere
    end-of-text is not the highest id of a caption, and its place would be wrong; or its rows are
    not what goes through the last layer norm."""

    width: Count = 512
    context_length: Count = 77
    hf_model_name: Literal["", None] = None
    pool_type: Literal["argmax", None] = "argmax"
    embed_cls: Literal[False, None] = False
    no_causal_mask: Literal[False, None] = False
    final_ln_after_pool: Literal[False, None] = False


class OpenClipModel(Config):
    text_cfg: OpenClipText


class OpenClip(Config):
    """An open_clip_config.json."""

    model_cfg: OpenClipModel


C = TypeVar("C", bound=Config)

#: What the libraries raise of a config that no model can be built from, or of weights that do not
#: fit it, beside the weights' readers' own errors.
BROKEN = (
    *(ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError),
    *(ArithmeticError, AssertionError, ImportError),  # of a quantised model's package
)


def first_line(error: BaseException) -> str:
    """Of the libraries' errors, which may be pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def read(setting: str, path: Path, kind: type[C]) -> C:
    """A config file, checked.

    Raises:
        SettingError: it cannot be read, is no JSON object, or a field has no value that its class
            could use.
    """
    record = read_json(setting, path)
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise SettingError(f"{setting}: {path} has no {name}") from error
        if not name:
            what = first["msg"].removeprefix("Value error, ")
            raise SettingError(f"{setting}: {path} has {what}") from error
        shown = repr(first["input"])
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise SettingError(f"{setting}: {path} has {name}={shown}: {first['msg']}") from error


def read_json(setting: str, path: Path) -> dict[str, Any]:
    """Raises SettingError where there is no JSON object."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingError(f"{setting}: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{setting}: {path} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise SettingError(f"{setting}: {path} is no JSON object but {type(record).__name__}")
    return record


def check_loaded(setting: str, folder: Path, stated: dict[str, Any], found: dict[str, Any]) -> None:
    """That the loaded model is what its config was read as.

    Raises:
        SettingError: names the first that is not.
    """
    for name, value in found.items():
        if value != stated[name]:
            raise SettingError(
                f"{setting}: the model in {folder} has {name} {value}, its config was read as "
                f"{stated[name]}"
            )

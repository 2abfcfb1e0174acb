"""Which family a text encoder's folder is of, and what its own config says. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import SettingError
from pipeline.encoders import configs
from pipeline.encoders.hub import require_files

#: Tokens of a T5 caption: it has no length of its own, its tokenizer says 512, and the official
#: code takes 120 (facts of DeepFloyd/t5-v1_1-xxl).
T5_LENGTH = 120

#: The files an open_clip folder may keep its weights in. The second is a pickle, which torch reads
#: with weights_only=True: tensors and plain containers, no code.
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_CLIP_TYPES = ("clip", "clip_text_model")
_T5_TYPES = ("t5", "mt5", "umt5")


@dataclass(frozen=True)
class TextConfig:
    """What a folder's config files say of its text encoder."""

    family: str  # "open_clip", "clip" or "t5": the modules of pipeline.encoders
    model_type: str  # as transformers names it; "" for open_clip
    width: int  # of a token vector
    length: int  # rows of a caption


def text_config(setting: str, folder: Path) -> TextConfig:
    """The family of a text encoder's folder, with its sizes.

    Raises:
        SettingError: no config, or one of a model that is not supported.
    """
    if (folder / "open_clip_config.json").is_file():
        return _open_clip(setting, folder)
    if not (folder / "config.json").is_file():
        raise SettingError(
            f"{setting}: {folder / 'open_clip_config.json'} is missing, and so is config.json"
        )
    path = folder / "config.json"
    kind = configs.read_json(setting, path).get("model_type", "")
    if kind == "clip_text_model":
        text = configs.read(setting, path, configs.ClipText)
        return TextConfig("clip", kind, text.hidden_size, text.max_position_embeddings)
    if kind == "clip":
        text = configs.read(setting, path, configs.Clip).text()
        return TextConfig("clip", kind, text.hidden_size, text.max_position_embeddings)
    if kind in _T5_TYPES:
        width = configs.read(setting, path, configs.T5).d_model
        return TextConfig("t5", kind, width, _t5_length(setting, folder))
    raise SettingError(
        f"{setting}: {path} is of model_type {kind!r}; supported are open_clip "
        f"folders and {', '.join((*_CLIP_TYPES, *_T5_TYPES))}"
    )


def require_text_files(setting: str, folder: Path, family: str) -> None:
    """Raises SettingError, which names the file, where weights or tokenizer are not there."""
    if family == "open_clip":
        open_clip_weights(setting, folder)
        return
    if not any((folder / name).is_file() for name in _TRANSFORMERS_WEIGHTS):
        # pytorch_model.bin is not read: a pickle may run code.
        require_files(setting, folder, _TRANSFORMERS_WEIGHTS[0])
    if family == "clip" and not (folder / "tokenizer.json").is_file():
        require_files(setting, folder, "vocab.json", "merges.txt")
    if family == "t5":
        require_files(setting, folder, "tokenizer.json")


def open_clip_weights(setting: str, folder: Path) -> Path:
    """The file with an open_clip model's weights.

    Raises:
        SettingError: there is none.
    """
    for name in OPEN_CLIP_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise SettingError(f"{setting}: {folder / OPEN_CLIP_WEIGHTS[0]} is missing")


def _open_clip(setting: str, folder: Path) -> TextConfig:
    path = folder / "open_clip_config.json"
    text = configs.read(setting, path, configs.OpenClip).model_cfg.text_cfg
    return TextConfig("open_clip", "", text.width, text.context_length)


def _t5_length(setting: str, folder: Path) -> int:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return T5_LENGTH
    longest = configs.read(setting, path, configs.Tokenizer).model_max_length
    return int(min(T5_LENGTH, longest or T5_LENGTH))

"""Text encoders of every family: what is stored is what the library itself gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel, UMT5EncoderModel

from pipeline import encoders
from pipeline.core.errors import SettingError
from pipeline.encoders import find_text, find_vae, load_text, text_facts, vae_facts
from pipeline.encoders.hub import weights_hash
from tests.pipeline.helpers.text_folders import (
    CLIP_KINDS,
    CLIP_LENGTH,
    T5_KINDS,
    T5_LENGTH,
    save_clip,
    save_t5,
)

TINY = Path(encoders.TEXT_ENCODERS["tiny-clip"].removeprefix("local-dir:"))
SCRIPTS = [
    "a red fox on blue",
    "рыжая лиса на синем",
    "青い背景に赤い狐",
    "ثعلب أحمر على خلفية زرقاء",
    "नीले पर लाल लोमड़ी",
    "שועל אדום על כחול",
    "🦊 on 🟦 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "e\u0301tude\u00a0\u200b\ttabs\nand lines",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    made = {kind: save_clip(root / kind, kind) for kind in CLIP_KINDS}
    return made | {kind: save_t5(root / kind, kind) for kind in T5_KINDS}


def load(folders: dict[str, Path], name: str) -> Any:
    return load_text(str(folders.get(name, name)))


def test_tiny_clip_equals_open_clip_called_directly() -> None:
    text = load_text("tiny-clip")
    whole: Any = open_clip.create_model(f"local-dir:{TINY}", require_pretrained=True)
    whole.eval().requires_grad_(False)  # with gradients, attention takes another path
    ids = open_clip.get_tokenizer(f"local-dir:{TINY}")(SCRIPTS)
    with torch.no_grad():
        x = whole.token_embedding(ids) + whole.positional_embedding
        expected = whole.ln_final(whole.transformer(x, attn_mask=whole.attn_mask))
    tokens, lengths = text.encode(SCRIPTS)
    assert torch.equal(tokens, expected)
    assert torch.equal(lengths, ids.argmax(dim=1) + 1)


def test_loading_logs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    load_text("tiny-clip")
    load_text("tiny-clip-judge", images=True)
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_a_tower_of_its_own(tmp_path: Path) -> None:
    """open_clip's custom_text models keep the tower apart; older checkpoints of them do not."""
    folder = shutil.copytree(TINY, tmp_path / "custom")
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["custom_text"] = True
    path.write_text(json.dumps(config))
    expected = load_text("tiny-clip").encode(SCRIPTS)[0]
    assert torch.equal(load_text(str(folder)).encode(SCRIPTS)[0], expected)
    whole: Any = load_text(str(folder), images=True)
    save_file(whole.model.state_dict(), folder / "open_clip_model.safetensors")
    assert torch.equal(load_text(str(folder)).encode(SCRIPTS)[0], expected)


def test_only_a_judge_holds_the_image_tower() -> None:
    text: Any = load_text("tiny-clip")
    assert text.model.visual is None
    judge: Any = load_text("tiny-clip", images=True)
    assert judge.model.visual is not None
    assert torch.equal(text.encode(SCRIPTS)[0], judge.encode(SCRIPTS)[0])
    assert torch.equal(text.embed_texts(SCRIPTS), judge.embed_texts(SCRIPTS))


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_clip_equals_transformers_called_directly(folders: dict[str, Path], kind: str) -> None:
    text = load(folders, kind)
    assert (text.facts.width, text.facts.length) == (32, CLIP_LENGTH)
    model: Any = CLIPTextModel.from_pretrained(folders[kind]).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folders[kind])
    batch = tokenizer(
        SCRIPTS, padding="max_length", max_length=CLIP_LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(batch.input_ids).last_hidden_state
    tokens, lengths = text.encode(SCRIPTS)
    assert torch.equal(tokens, expected)
    for ids, length in zip(batch.input_ids.tolist(), lengths.tolist(), strict=True):
        assert ids.index(tokenizer.eos_token_id) == length - 1


@pytest.mark.parametrize("kind", T5_KINDS)
def test_t5_equals_transformers_called_directly(folders: dict[str, Path], kind: str) -> None:
    text = load(folders, kind)
    assert (text.facts.width, text.facts.length) == (32, T5_LENGTH)
    family: Any = UMT5EncoderModel if kind == "umt5" else T5EncoderModel
    model = family.from_pretrained(folders[kind]).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folders[kind])
    batch = tokenizer(
        SCRIPTS, padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    tokens, lengths = text.encode(SCRIPTS)
    assert torch.equal(tokens, expected)
    assert lengths.tolist() == [ids.index(1) + 1 for ids in batch.input_ids.tolist()]


@pytest.mark.parametrize("kind", [*CLIP_KINDS, *T5_KINDS])
def test_padding_changes_no_real_row(folders: dict[str, Path], kind: str) -> None:
    """A caption's real rows are those of the same model given no padding at all."""
    text = load(folders, kind)
    (rows,), (length,) = text.encode(["a red fox"])
    assert 3 <= length < text.facts.length
    batch = text.tokenizer(["a red fox"], return_tensors="pt")
    assert batch.input_ids.shape == (1, length)
    with torch.no_grad():
        alone = text.model(batch.input_ids).last_hidden_state[0]
    near = {"rtol": 0, "atol": 1e-6 * float(alone.abs().max())}
    torch.testing.assert_close(rows[:length], alone, **near)
    # Neighbours in the batch change nothing either.
    beside = text.encode(["on " * 50, "a red fox", "fox"])[0][1]
    torch.testing.assert_close(beside[:length], rows[:length], **near)


def test_t5_without_its_mask_would_differ(folders: dict[str, Path]) -> None:
    text = load(folders, "t5")
    (rows,), (length,) = text.encode(["a red fox"])
    batch = text.tokenizer(["a red fox"], padding="max_length", max_length=T5_LENGTH)
    with torch.no_grad():
        unmasked = text.model(torch.tensor(batch.input_ids)).last_hidden_state[0]
    assert (unmasked[:length] - rows[:length]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["tiny-clip", "clip", "t5"])
def test_captions_of_any_script_and_length(folders: dict[str, Path], kind: str) -> None:
    text = load(folders, kind)
    longest = ["a red fox on " * 769 + "ab", "狐" * 10_000, "x" * 10_000, "🦊" * 10_000]
    captions = [*SCRIPTS, "", " ", *longest]
    tokens, lengths = text.encode(captions)
    assert tokens.shape == (len(captions), text.facts.length, text.facts.width)
    assert (tokens.dtype, tokens.device.type) == (torch.float32, "cpu")
    assert tokens.isfinite().all()
    assert ((lengths >= 1) & (lengths <= text.facts.length)).all()
    cut = lengths[-4:].tolist()
    if kind == "t5":  # whose small tokenizer makes one <unk> of what it does not know
        cut = [cut[0], cut[2]]
    assert cut == [text.facts.length] * len(cut)
    assert last_ids(text, longest[:1]) == last_ids(text, ["fox"])  # end-of-text is kept


def last_ids(text: Any, captions: list[str]) -> set[int]:
    """The id at each caption's last real row."""
    if hasattr(text.model, "token_embedding"):
        return set(text.tokenizer(captions).max(dim=1).values.tolist())
    lengths = text.encode(captions)[1]
    ids = text.tokenizer(captions, max_length=text.facts.length, truncation=True).input_ids
    return {row[length - 1] for row, length in zip(ids, lengths.tolist(), strict=True)}


def test_computing_in_bfloat16(folders: dict[str, Path]) -> None:
    for name in ("tiny-clip", "clip", "t5"):
        exact = load(folders, name)
        text = load_text(str(folders.get(name, name)), dtype="bfloat16")
        assert (exact.facts.dtype, text.facts.dtype) == ("float32", "bfloat16")
        a, b = exact.encode(["a red fox"])[0], text.encode(["a red fox"])[0]
        assert b.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.1


def test_facts_come_from_the_folders_own_config(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        facts = text_facts(str(folder))
        found, _ = find_text(str(folder))
        assert facts == found.model_copy(update={"weights_sha256": ""}), name
        assert found.weights_sha256 == weights_hash(folder)
        assert facts.repo == f"local-dir:{folder}"


def test_a_t5_caption_has_120_tokens_where_its_tokenizer_allows_more(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["t5"], tmp_path / "t5")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for length, expected in ((512, 120), (10**30, 120), (64, 64), (None, 120)):
        path.write_text(json.dumps({**config, "model_max_length": length}))
        assert text_facts(str(folder)).length == expected


def test_a_hub_id_with_a_revision(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--me--small-t5"
    shutil.copytree(folders["t5"], repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text(commit)
    for name in ("me/small-t5@v1", f"me/small-t5@{commit}"):
        facts = load_text(name).facts
        assert (facts.name, facts.repo, facts.revision) == (name, "hf-hub:me/small-t5", commit)
        assert (text_facts(name).width, text_facts(name).repo) == (32, facts.repo)
    for name in ("me/small-t5@v2", "me/small-t5", "me/none"):
        with pytest.raises(SettingError, match=f"pipeline fetch {name}"):
            text_facts(name)
    with pytest.raises(SettingError, match="no folder and no hub id"):
        vae_facts("me/small t5")


def copy_of(kind: str, folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders.get(kind, TINY), tmp_path / kind)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("tiny-clip", "open_clip_config.json"),
        ("tiny-clip", "open_clip_model.safetensors"),
        ("clip", "model.safetensors"),
        ("t5", "config.json"),
        ("t5", "tokenizer.json"),
        ("t5", "model.safetensors"),
    ],
)
def test_a_missing_file_is_named(
    folders: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    folder = copy_of(kind, folders, tmp_path)
    (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody reads")
    with pytest.raises(SettingError, match=rf"{name}( is missing|, and so)") as error:
        load_text(str(folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("kind", ["tiny-clip", "clip", "t5"])
def test_weights_that_lack_a_tensor_are_no_random_weights(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = copy_of(kind, folders, tmp_path)
    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    gone = next(name for name in state if name.endswith("layer_norm.weight") or "ln_final" in name)
    state.pop(gone)
    save_file(state, path, {"format": "pt"})
    with pytest.raises(SettingError, match=gone.split(".")[-1]) as error:
        load_text(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["tiny-clip", "clip", "t5"])
def test_weights_that_are_cut_off(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = copy_of(kind, folders, tmp_path)
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SettingError, match=r"the weights in .* are cut off") as error:
        load_text(str(folder))
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_supported(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of("t5", folders, tmp_path)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SettingError, match="model_type 'bert'; supported are open_clip"):
        text_facts(str(folder))
    folder = copy_of("tiny-clip", folders, tmp_path)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    for key, value in {"hf_model_name": "xlm-roberta-base", "pool_type": "last"}.items():
        text = {**config["model_cfg"]["text_cfg"], key: value}
        path.write_text(json.dumps({"model_cfg": {**config["model_cfg"], "text_cfg": text}}))
        with pytest.raises(SettingError, match=f"text_cfg.{key}='{value}'"):
            find_text(str(folder))
    with pytest.raises(SettingError, match="a judge of pictures is an open_clip model"):
        load_text(str(folders["t5"]), images=True)


def test_a_pickle_of_open_clip_is_read_as_tensors_only(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of("tiny-clip", folders, tmp_path)
    state = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    path = folder / "open_clip_pytorch_model.bin"
    torch.save(state, path)
    for images in (False, True):
        text = load_text(str(folder), images=images)
        assert torch.equal(text.encode(SCRIPTS)[0], load_text("tiny-clip").encode(SCRIPTS)[0])
    torch.save({**state, "evil": Evil()}, path)
    for images in (False, True):
        with pytest.raises(SettingError, match="Weights only load failed") as error:
            load_text(str(folder), images=images)
        assert "\n" not in str(error.value)


class Evil:
    """Would run code where a pickle is loaded whole."""

    def __reduce__(self):
        return pytest.fail, ("the pickle ran",)


@pytest.mark.parametrize("name", encoders.WEIGHTS_SHA256)
def test_other_weights_than_those_of_the_table_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = name in encoders.TEXT_ENCODERS
    find: Any = find_text if text else find_vae
    facts, folder = find(name)
    assert facts.weights_sha256 == encoders.WEIGHTS_SHA256[name]
    folder = shutil.copytree(folder, tmp_path / name)
    if text:
        monkeypatch.setitem(encoders.TEXT_ENCODERS, name, f"local-dir:{folder}")
    else:
        monkeypatch.setitem(encoders.VAES, name, (str(folder), ""))
    find(name)
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SettingError) as error:
        find(name)
    assert encoders.WEIGHTS_SHA256[name] in str(error.value)
    assert weights_hash(folder) in str(error.value)
    assert "\n" not in str(error.value)

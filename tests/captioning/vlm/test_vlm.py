"""Small random models of the real classes, through the code path of the large ones."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captioning import BadPicture, BadSetting, Caption, Failure, Picture, load
from captioning.vlm.captioner import AHEAD, WINDOW
from captioning.vlm.model import GumbelNoise

TOKENS = 16


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Noise over a colour, of many sizes and shapes."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        width, height = rng.integers(10, 120, 2)
        colour = rng.integers(0, 255, 3)
        noise = rng.normal(0, 60, (height, width, 3))
        made.append(Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)))
    return made


def keyed(images: list[Image.Image]) -> list[Picture]:
    return [
        Picture(f"{number:03d}", lambda image=image: image, size=image.size)
        for number, image in enumerate(images)
    ]


def texts(folder: Path, images: list[Image.Image], **settings: Any) -> list[str]:
    captioner = load(str(folder), **{"max_tokens": TOKENS, **settings})
    return [caption.text for caption in captioner(images)]


@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen"])
def test_a_batch_writes_what_one_by_one_writes(request, kind):
    folder = request.getfixturevalue(kind)
    images = pictures(9)
    two = {"prompt": "long,short", "max_tokens": 12}
    batched = texts(folder, images, **two, batch_size=4)
    assert batched == texts(folder, images, **two, batch_size=1)
    assert len(set(batched)) > len(batched) // 2  # the pictures show in the texts


def test_a_text_is_what_transformers_writes(llava):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(llava, use_fast=True)
    model: Any = AutoModelForImageTextToText.from_pretrained(llava)
    images = pictures(6)
    captioner = load(str(llava), prompt="What is it, in a word?", max_tokens=TOKENS)
    found = captioner(images)
    assert {caption.finish_reason for caption in found} == {"stop", "length"}
    for image, caption in zip(images, found, strict=True):
        inputs = processor(
            images=image,
            text="USER: <image>\nWhat is it, in a word? ASSISTANT:",
            return_tensors="pt",
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
        end = processor.tokenizer.eos_token_id
        assert caption.text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert caption.tokens == len(ids) - ids.count(end)
        assert caption.finish_reason == ("stop" if end in ids else "length")


def test_the_folders_own_way_of_sampling_is_not_taken_over(llava, tmp_path):
    folder = tmp_path / "sampling"
    shutil.copytree(llava, folder)
    path = folder / "generation_config.json"
    own = {"do_sample": True, "temperature": 2.0, "top_k": 5, "repetition_penalty": 9.0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own, "num_beams": 3}))
    assert texts(folder, pictures(4)) == texts(llava, pictures(4))


def test_at_a_temperature_a_text_does_not_depend_on_its_batch(llava):
    images = keyed(pictures(9))
    drawn = {"temperature": 1.0, "num_captions": 2, "max_tokens": TOKENS}

    def write(some: list[Picture], **settings: Any) -> dict[str, Any]:
        return dict(load(str(llava), **{**drawn, **settings}).caption(some))

    whole = write(images, batch_size=4)
    alone = write(images[3:4], batch_size=1)
    assert alone["003"] == whole["003"]
    assert write(images[::-1], batch_size=3) == whole
    assert write(images, batch_size=4, seed=1) != whole
    first, second = whole["000"]
    assert first.text != second.text
    assert (first.number, second.number) == (0, 1)


def test_noise_makes_an_argmax_draw_as_softmax_says():
    scores = torch.tensor([2.0, 1.0, 0.0, -30.0])
    rows = 4000
    noise = GumbelNoise(0.5, list(range(rows)))
    drawn = noise(torch.zeros(rows, 1), scores.repeat(rows, 1)).argmax(1)
    found = torch.bincount(drawn, minlength=4) / rows
    torch.testing.assert_close(found, torch.softmax(scores / 0.5, 0), atol=0.02, rtol=0)


def test_a_failed_picture_leaves_the_others_as_they_are(llava):
    def broken() -> Image.Image:
        raise BadPicture("undecodable", "not a picture")

    good = keyed(pictures(6))
    line = Image.new("RGB", (5000, 1), (9, 99, 9))
    dot = Image.new("RGB", (1, 1), (9, 99, 9))
    odd = [Picture("bad", broken), Picture("line", lambda: line), Picture("dot", lambda: dot)]
    captioner = load(str(llava), max_tokens=TOKENS, batch_size=4, prompt="long,short")
    expected = dict(captioner.caption(good))
    found = dict(captioner.caption([*good[:2], *odd, *good[2:]]))
    assert found.pop("bad") == Failure("undecodable", "not a picture")
    failure: Any = found.pop("line")
    assert failure.reason == "aspect-ratio"
    captions: Any = found.pop("dot")
    assert len(captions) == 2
    assert found == expected


def test_a_huge_picture_is_made_smaller_before_it_is_looked_at(llava, monkeypatch):
    image = Image.new("RGB", (9000, 300), (200, 30, 30))
    captioner: Any = load(str(llava), max_tokens=4)
    real, sizes = captioner.model.processor, []

    def recorded(images: list[list[Image.Image]], **more: Any) -> Any:
        sizes.extend(one.size for (one,) in images)
        return real(images=images, **more)

    monkeypatch.setattr(captioner.model, "processor", recorded)
    assert isinstance(dict(captioner.caption([Picture("x", lambda: image)]))["x"], list)
    assert sizes == [(4096, 137)]
    assert image.size == (9000, 300)  # the caller's is left alone


def test_what_the_processor_refuses_is_that_pictures_failure(llava, monkeypatch):
    captioner: Any = load(str(llava), max_tokens=TOKENS, batch_size=4)
    images = keyed(pictures(5))
    expected = dict(captioner.caption(images))
    real = captioner.model.processor

    def picky(images: list[list[Image.Image]], **more: Any) -> Any:
        if any(image.size == (7, 7) for (image,) in images):
            raise ValueError("7 is not liked\nat all")
        return real(images=images, **more)

    monkeypatch.setattr(captioner.model, "processor", picky)
    small = Picture("seven", lambda: Image.new("RGB", (7, 7)))
    found = dict(captioner.caption([*images[:2], small, *images[2:]]))
    assert found.pop("seven") == Failure("unprocessable", "ValueError: 7 is not liked")
    assert found == expected


def test_out_of_memory_halves_the_batch(llava, monkeypatch):
    captioner: Any = load(str(llava), max_tokens=TOKENS, batch_size=8)
    images = pictures(11)
    expected = captioner(images)
    real, sizes = captioner.model.model.generate, []

    def small(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(**inputs)

    monkeypatch.setattr(captioner.model.model, "generate", small)
    limit = 3
    captioner.counters.clear()
    assert captioner(images) == expected
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 3]
    assert captioner.counters["split, out of memory"] == 3
    limit = 0
    with pytest.raises(BadSetting, match="out of memory with one picture"):
        captioner(images)


def test_weights_that_do_not_fit_are_one_clear_line(llava, monkeypatch):
    def to(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14 GiB\nand so on")

    monkeypatch.setattr("transformers.PreTrainedModel.to", to)
    with pytest.raises(BadSetting, match=r"weights do not fit.*use a GPU with more") as caught:
        texts(llava, pictures(1))
    assert "\n" not in str(caught.value)


def test_pictures_are_opened_in_a_thread_and_a_bounded_number_ahead(llava):
    opened: list[int] = []
    threads: set[int] = set()
    batch = 2

    def all_of_them() -> Iterator[Picture]:
        for number, image in enumerate(pictures(5 * WINDOW)):
            yield Picture(f"{number:03d}", lambda n=number, image=image: look(n, image))

    def look(number: int, image: Image.Image) -> Image.Image:
        opened.append(number)
        threads.add(threading.get_ident())
        return image

    captioner = load(str(llava), max_tokens=2, batch_size=batch)
    ahead = [len(opened) - done for done, _ in enumerate(captioner.caption(all_of_them()))]
    assert len(ahead) == len(opened) == 5 * WINDOW
    assert max(ahead) <= (AHEAD + 1) * batch
    assert threading.get_ident() not in threads
    assert captioner.counters[f"loaded captioner {llava}"] == 1


def test_a_captioner_travels_without_its_weights_and_with_its_revision(llava, monkeypatch):
    captioner = load(str(llava), max_tokens=TOKENS)
    images = pictures(2)
    expected = captioner(images)
    data = pickle.dumps(captioner)
    assert len(data) < 4000
    monkeypatch.setattr("captioning.vlm.hub.files_hash", lambda folder: pytest.fail("read again"))
    assert pickle.loads(data)(images) == expected


def test_a_folder_has_one_name_however_it_is_written(llava, monkeypatch):
    monkeypatch.chdir(llava.parent)
    plain = load(llava.name, prompt="short")
    for written in (f"{llava.name}/", f"./{llava.name}"):
        other = load(written, prompt="short")
        assert (other.name, other.label()) == (plain.name, plain.label())


def test_the_revision_follows_the_files_not_the_place(llava, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(llava, copy)
    assert load(str(copy)).revision == load(str(llava)).revision
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert load(str(copy)).revision != load(str(llava)).revision


def test_a_hub_model_comes_from_the_local_cache_alone(llava, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadSetting, match=r"run `pipeline fetch llava-1\.5-7b`"):
        assert load("llava-1.5-7b").revision
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--small"
    shutil.copytree(llava, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    captioner = load("someone/small@main", max_tokens=4)
    (caption,) = captioner(pictures(1))
    assert (caption.captioner, caption.revision) == ("someone/small@main", commit)
    # Planned here, captioned on a machine whose cache is older or newer.
    travelled = pickle.loads(pickle.dumps(captioner))
    (repo / "snapshots" / commit).rename(repo / "snapshots" / commit[::-1])
    (repo / "refs" / "main").write_text(commit[::-1])
    with pytest.raises(BadSetting, match=f"the run began with {commit}; run `pipeline fetch"):
        travelled(pictures(1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_computes_in_other_types(llava, dtype):
    captions = load(str(llava), max_tokens=4, dtype=dtype)(pictures(3))
    assert all(isinstance(caption, Caption) for caption in captions)


# A prompt and its slot


def without_template(folder: Path, target: Path, template: str = "") -> Path:
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((target / "processor_config.json").read_text())
    config.pop("chat_template", None)
    (target / "processor_config.json").write_text(json.dumps(config))
    if template:
        (target / "chat_template.jinja").write_text(template)
    return target


def test_a_prompt_without_a_slot_for_the_picture_is_one_clear_line(llava, tmp_path):
    bare = without_template(llava, tmp_path / "bare")
    with pytest.raises(BadSetting, match=r"has no chat template.*<image>"):
        texts(bare, pictures(1))
    blind = "{{ messages[0]['content'][-1]['text'] }}"
    blind_folder = without_template(llava, tmp_path / "blind", blind)
    with pytest.raises(BadSetting, match="no slot for a picture"):
        texts(blind_folder, pictures(1))
    strict = "{{ raise_exception('text alone') }}"
    with pytest.raises(BadSetting, match=r"takes no picture and text: text alone.*<image>"):
        texts(without_template(llava, tmp_path / "strict", strict), pictures(1))
    raw = "USER: <image>\nWhat is it? ASSISTANT:"
    images = pictures(3)
    assert texts(bare, images, prompt=raw) == texts(llava, images, prompt="What is it?")


def test_a_template_that_writes_the_first_token_gets_no_second(llava, tmp_path):
    template = "<s>USER: <image>\n{{ messages[0]['content'][-1]['text'] }}"
    template = template.replace(
        "<image>", "{% if messages[0]['content'] | length > 1 %}<image>{% endif %}"
    )
    folder = without_template(llava, tmp_path / "bos", template)
    captioner: Any = load(str(folder), max_tokens=2)
    captioner(pictures(1))
    model = captioner.model
    ids = model._inputs([(type("Row", (), {"number": 0}), pictures(1)[0])])["input_ids"][0]
    assert ids.tolist().count(model.tokenizer.bos_token_id) == 1


# Folders that hold something else


def test_a_folder_that_is_no_such_model_is_one_clear_line(llava, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    (tmp_path / "empty").mkdir()
    with pytest.raises(BadSetting, match=r"config.json is missing"):
        texts(tmp_path / "empty", pictures(1))
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    with pytest.raises(
        BadSetting, match=r"cannot load .* as an image-text-to-text model"
    ) as caught:
        texts(tmp_path / "text", pictures(1))
    assert "\n" not in str(caught.value)
    pickles = tmp_path / "pickles"
    shutil.copytree(llava, pickles)
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    with pytest.raises(BadSetting, match="weights as pickles are not read"):
        texts(pickles, pictures(1))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_half_a_file_is_one_clear_line(llava, tmp_path, name):
    folder = tmp_path / "half"
    shutil.copytree(llava, folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadSetting, match="cannot load") as caught:
        texts(folder, pictures(1))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_clear_line(llava):
    with pytest.raises(BadSetting, match="device=cuda: torch sees no GPU"):
        texts(llava, pictures(1), device="cuda")


def test_a_model_whose_processor_cannot_count_tokens_is_batched_all_the_same(llava, tmp_path):
    """LLaVA with SigLIP's processor, as llava-interleave has it: it crops nothing."""
    folder = tmp_path / "siglip"
    shutil.copytree(llava, folder)
    path = folder / "preprocessor_config.json"
    side = json.loads(path.read_text())["crop_size"]
    path.write_text(json.dumps({"image_processor_type": "SiglipImageProcessor", "size": side}))
    images = pictures(5)
    assert len(set(texts(folder, images, batch_size=2))) > 2

"""Sheets painted while training: the right pictures, and never in training's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.encoders import load_text
from tests.training.helpers.groups import SHIPPED, make_source, settings
from tests.training.helpers.runs import equal, make_toy, plan_of
from training.data.token_vectors import Caption
from training.generator import Generator
from training.observe import metrics_log
from training.observe.image_grid import LINE, MARGIN
from training.observe.sample_images import distinct, stack
from training.run import trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own

PROMPTS = ["a red rocket", "moon"]


@pytest.fixture(scope="module", params=["trimmed", "full"])
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings over shards that say they are of the encoders that ship with the package."""
    folder = tmp_path_factory.mktemp("samples")
    make_source(folder / "data", SHIPPED, text=request.param)
    raw = settings(folder / "data", SHIPPED, folder / "unset")
    stage = {"steps": 4, "mask": "deferred", "mask_ratio": 0.5, "lr": 1e-3}
    return {
        **raw,
        "data": raw["data"] | {"text": request.param},
        "stages": {"masked": stage},
        "evaluate": {"every": 0},
    }


def pictures(sheet: Path, captions: int, side: int = 64, zoom: int = 2) -> np.ndarray:
    """A sheet's pictures, at their own size: one column, captions of one line."""
    pixels = np.asarray(Image.open(sheet).convert("RGB"))[:, MARGIN:]
    height = zoom * side + LINE + MARGIN
    cells = [pixels[MARGIN + n * height :] for n in range(captions)]
    return np.stack([cell[: zoom * side : zoom, : zoom * side : zoom] for cell in cells])


def test_sheets_are_what_generate_paints(shipped: dict[str, Any], tmp_path: Path) -> None:
    """The last sheet's pictures, from the finished weights; and training is what it is without."""
    ask = {"every": 2, "prompts": PROMPTS, "steps": 3, "seed": 5, "guidance": 2.0}
    trainer.run(plan_of(shipped, tmp_path / "run", samples=ask))
    trainer.run(plan_of(shipped, tmp_path / "plain"))
    folder = tmp_path / "run/masked"
    sheets = sorted((folder / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-00000002.png", "step-00000004.png"]
    generator = Generator(str(folder), "cpu")
    expected = generator.generate(PROMPTS, guidance=2.0, steps=3, seed=5)
    found = pictures(sheets[-1], 2)
    assert np.abs(found.astype(int) - expected).max() <= 1  # rounding of equal numbers
    assert not np.array_equal(found, pictures(sheets[0], 2))
    assert equal(folder / "live.safetensors", tmp_path / "plain/masked/live.safetensors")
    state = torch.load(folder / "step-00000004.pt", weights_only=True)["state"]
    assert all(name.startswith("dit.") for name in state["model"])
    assert state["callbacks"]["SampleSheets"] == {}


def test_held_out_captions_are_the_default(shipped: dict[str, Any], tmp_path: Path) -> None:
    """No text encoder is needed: their token vectors are in the shards."""
    from training.observe import sample_images

    asked: list[list[str]] = []
    ask = {"every": 3, "count": 3, "steps": 1}
    plan = plan_of(shipped, tmp_path / "run", samples=ask, logging={"to": ["tensorboard"]})
    stack_tokens = sample_images.stack

    def watched(tokens: list[np.ndarray], trimmed: bool) -> Any:
        asked.append(
            [f"caption {int(t[0, 0])} of 00002" for t in tokens]
        )  # as groups.py makes them
        return stack_tokens(tokens, trimmed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_images, "stack", watched)
        trainer.run(plan)
    assert asked == [[f"caption {n} of 00002" for n in range(3)]] * 2
    assert len(list((tmp_path / "run/masked/samples").glob("step-*.png"))) == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/masked/tensorboard/toy-masked")).Reload()
    assert [event.step for event in events.Images("samples")] == [3, 4]


@pytest.mark.parametrize(
    ("how", "message"),
    [({"steps": 1}, "vae="), ({"steps": 3, "guidance": 1e38}, "latents are no numbers; lower it")],
    ids=["a VAE without weights", "guidance beyond float32"],
)
def test_a_sheet_that_fails_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture, how: dict[str, Any], message: str
) -> None:
    """Said and counted each time; training ends as it would without."""
    raw = make_toy(tmp_path) | {"stages": {"masked": {"steps": 3}}}
    trainer.run(plan_of(raw, tmp_path / "run", samples={"every": 1, **how}))
    lines = [line for line in capsys.readouterr().err.splitlines() if "no samples" in line]
    assert len(lines) == 3
    assert lines[-1].startswith("masked 3/3  no samples (3 failed so far): ")
    assert message in lines[-1]
    rows = metrics_log.read(tmp_path / "run/masked/metrics.jsonl")
    assert [row["samples/failed"] for row in rows] == [1, 2, 3]
    trainer.run(plan_of(raw, tmp_path / "plain"))
    assert equal(tmp_path / "run/model.safetensors", tmp_path / "plain/model.safetensors")


def test_tokens_of_prompts_and_of_shards_are_laid_out_alike() -> None:
    """Padded to the longest with zeros, as the loader and the generator do."""
    text = load_text(SHIPPED.text)
    tokens, lengths = text.encode(PROMPTS)
    rows = [t[:n].half().numpy() for t, n in zip(tokens, map(int, lengths), strict=True)]
    y, mask = stack(rows, trimmed=True)
    assert y.shape == (2, int(max(lengths)), tokens.shape[2])
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [int(n) for n in lengths]
    assert not y[~mask].any()
    assert torch.equal(y[mask], tokens.half().float()[:, : y.shape[1]][mask])
    assert stack([t.half().numpy() for t in tokens], trimmed=False)[1] is None


def test_distinct_captions() -> None:
    captions = [Caption(text, np.zeros((1, 1))) for text in "abacb"]
    assert [caption.text for caption in distinct(captions, 2)] == ["a", "b"]
    assert [caption.text for caption in distinct(captions, 9)] == ["a", "b", "c"]

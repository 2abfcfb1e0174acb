"""Everything that happens at a stage's steps beside the training itself, put together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from composer import Callback
from composer.utils import dist, get_device

from pipeline.core.errors import SettingError
from training.checkpoint.run_folder import StageFolder
from training.config.plan import TrainingPlan
from training.data import heldout
from training.data.shared_memory import of_first_rank
from training.data.token_vectors import Caption
from training.model import DiffusionModel
from training.observe import sample_images
from training.observe.eval_context import EvalContext
from training.observe.evaluation import Evaluation
from training.observe.meter import DeviceHours, Meter
from training.observe.metrics import Metrics, price_of
from training.observe.metrics_log import Journal
from training.observe.progress import Progress
from training.observe.sample_images import SampleSheets
from training.optim.ema import EMA
from training.optim.guard import Guard
from training.optim.optimizers import learning_rate
from training.ranks import world_size
from training.run.stage_callbacks import SaveCheckpoints, StepFunctions
from training.run.stopping import StopAtSignal
from training.weights.weights_file import attributions


def say(text: str) -> None:
    """A line to the user, from the first rank."""
    if dist.get_global_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def callbacks(
    plan: TrainingPlan,
    name: str,
    path: StageFolder,
    begun: str,
    model: DiffusionModel,
    ema: EMA,
    rollbacks: int,
    device_hours: DeviceHours,
    stop: StopAtSignal,
    copy: Callable[[Path], None],
) -> list[Callback]:
    """The callbacks of one stage, in the order in which they rely on each other.

    Args:
        begun: fingerprint of what the stage was begun with.
        stop: says whether the run ends after a step.
        copy: called with each checkpoint that is whole.

    Raises:
        SettingError: a held-out picture has no caption.
    """
    config, stage, estimate = plan.config, plan.config.stages[name], plan.config.estimate

    def tell(step: int, text: str) -> None:
        say(f"{name} {step}/{stage.steps}  {text}")

    meter = Meter(model)
    guard = Guard(config.guard, stage.clip, ema, rollbacks, tell)
    price = price_of(get_device(None).name, estimate.peak_tflops, estimate.dollars_per_gpu_hour)
    metrics = Metrics(
        meter,
        guard,
        device_hours,
        price,
        Journal(path.metrics) if dist.get_global_rank() == 0 else None,
        lambda step: learning_rate(stage, step),
        stage.steps,
        config.logging.every_steps,
        tell,
    )
    context = EvalContext(
        model,
        ema.averages,
        stage.steps,
        stage.microbatch or stage.batch_size // world_size(),
        plan.data[name][0].latents.vae,
        config.data.text == "trimmed",
        meter,
        metrics,
        tell,
    )
    return [
        StepFunctions(model, stage),
        guard,
        ema,
        meter,
        metrics,
        Progress(name, stage.steps, config.logging.every, meter, guard, device_hours, price),
        *_evaluation(plan, name, context),
        *_samples(plan, name, context, path),
        SaveCheckpoints(
            path, stage, begun, config.checkpoint.keep, guard, meter, metrics, stop, copy, tell
        ),
    ]


def _evaluation(plan: TrainingPlan, name: str, context: EvalContext) -> list[Callback]:
    settings, ranks = plan.config.evaluate, world_size()
    if not settings.every:
        return []
    total = of_first_rank(heldout.count(plan, name, settings.split, settings.samples))
    if not total:
        say(f"stage {name}: no shard of split {settings.split}, so there is no evaluation")
        return []
    first = dist.get_global_rank() % total
    pictures = heldout.read(plan, name, settings.split, settings.samples, first, ranks)
    return [Evaluation(context, settings, pictures, total)]


def _samples(
    plan: TrainingPlan, name: str, context: EvalContext, path: StageFolder
) -> list[Callback]:
    settings, split = plan.config.samples, plan.config.evaluate.split

    def captions() -> list[Caption]:
        if settings.prompts:
            text = plan.data[name][0].text.text_encoder
            return sample_images.encode(settings.prompts, text, context.trimmed)
        # Some captions are those of several pictures.
        pictures = heldout.read(plan, name, split, 4 * settings.count)
        if not pictures:
            raise SettingError(
                f"no shard of split {split} to take captions of: set samples.prompts"
            )
        return sample_images.distinct([picture.caption for picture in pictures], settings.count)

    if not settings.every:
        return []
    if not settings.prompts and not of_first_rank(heldout.count(plan, name, split, 1)):
        say(f"stage {name}: no shard of split {split}, no samples.prompts, so there are no samples")
        return []
    credit = attributions([source.name for source in plan.data[name]])
    return [SampleSheets(context, settings, captions, path.samples, credit)]

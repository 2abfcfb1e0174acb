"""A plan -> network, loader, optimizer, callbacks, Trainer: one stage after the other.

Each stage begins from the last checkpoint of the one before, also when both run in one process, so
an interrupted run cannot differ from an uninterrupted one.
"""

from __future__ import annotations

import gc
import itertools
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import torch
from composer import Callback, DataSpec, Trainer
from composer.utils import dist, get_device

from pipeline.core.errors import SettingError, StorageError
from training.checkpoint import run_folder
from training.checkpoint.checkpoints import Checkpoint, CheckpointState, allow_only_data, read
from training.checkpoint.remote import RemoteCopy, fetch
from training.checkpoint.run_folder import StageFolder
from training.config import init_from
from training.config.plan import TrainingPlan, TrainingSource, network_config
from training.config.stage_settings import Power
from training.data import loader_deaths
from training.data.loader import LatentText, global_rows, make_dataset, make_loader
from training.data.shared_memory import of_first_rank
from training.model import DiffusionModel, Objective
from training.network.config import DiTConfig
from training.network.dit import MicroDiT
from training.objectives import OBJECTIVES
from training.observe import curve, metrics_log
from training.observe.loggers import make_loggers
from training.observe.meter import DeviceHours
from training.optim import parallel
from training.optim.dtensors import gathered
from training.optim.ema import EMA
from training.optim.guard import RollBack
from training.optim.optimizers import make_optimizer
from training.randomness import keyed_seed, stage_key
from training.ranks import world_size
from training.run import callbacks as observers
from training.run.callbacks import say
from training.run.stopping import StopAtSignal, Terminated
from training.weights import weights_file, weights_metadata

COMPILED_MULTIPLE = 16  # caption rows of a batch: fewer lengths, fewer graphs
WAIT_S = 7200.0  # that ranks wait for the first: it fetches, saves and exports gigabytes


def run(plan: TrainingPlan, callbacks: Sequence[Callback] = ()) -> None:
    """Trains every stage that is not finished.

    Args:
        callbacks: further ones, for every stage, after the trainer's own.

    Raises:
        SettingError: a checkpoint cannot be read or written, a picture has no caption, or the loss
            is no number even after roll-backs.
        StorageError: finished weights cannot be written, or `checkpoint.remote` cannot be read or
            does not have every file at the end.
        Terminated: SIGTERM came; a checkpoint is saved.
    """
    allow_only_data()
    stop = StopAtSignal()
    with stop.listening():
        _run_stages(plan, callbacks, stop)


def _run_stages(plan: TrainingPlan, callbacks: Sequence[Callback], stop: StopAtSignal) -> None:
    checkpoint, before = plan.config.checkpoint, None
    if world_size() > 1:
        dist.initialize_dist(get_device(None), WAIT_S)
    first = dist.get_global_rank() == 0
    if first and fetch(plan):
        run_folder.check(plan)  # what was there already may be of another training
    if first:
        run_folder.check_whole(plan, say)
    dist.barrier()
    device_hours = DeviceHours(world_size())
    left = run_folder.unfinished(plan)
    url = checkpoint.remote if first else ""
    try:
        with RemoteCopy(plan.config.run_folder(), url, checkpoint.keep) as mirror:
            for name, stage in plan.config.stages.items():
                path = run_folder.stage_folder(plan, name)
                if name in left:
                    stop.folder = path
                    _run_stage(plan, name, path, before, device_hours, callbacks, mirror, stop)
                elif path.finished():
                    say(f"stage {name}: finished before, not run again")
                    mirror.catch_up(path)
                before = path.checkpoint(stage.steps)
    except Terminated:
        if stop.now:
            # A launcher kills the other ranks when one has ended; the first may still be saving.
            dist.barrier()
        raise


def _run_stage(
    plan: TrainingPlan,
    name: str,
    path: StageFolder,
    before: Path | None,
    device_hours: DeviceHours,
    callbacks: Sequence[Callback],
    mirror: RemoteCopy,
    stop: StopAtSignal,
) -> None:
    """One stage, from its last checkpoint again whenever the guard says so."""
    device_hours.raise_to(
        of_first_rank(metrics_log.last(path.metrics, "train/device_hours") or 0.0) * 3600
    )
    while True:
        back = _attempt(plan, name, path, before, device_hours, callbacks, mirror, stop)
        if back is None:
            return
        _roll_back(plan, name, path, back)
        gc.collect()  # the network and optimizer of the attempt are in cycles


def _attempt(
    plan: TrainingPlan,
    name: str,
    path: StageFolder,
    before: Path | None,
    device_hours: DeviceHours,
    callbacks: Sequence[Callback],
    mirror: RemoteCopy,
    stop: StopAtSignal,
) -> RollBack | None:
    """Trains to the stage's end with its own loader, schedule and Trainer: from its own latest
    checkpoint, or from the stage before, or from nothing. Or until the guard wants to roll back."""
    config, stage = plan.config, plan.config.stages[name]
    resume = path.checkpoints()[-1] if path.checkpoints() else None
    start = read(before) if before is not None and resume is None else None
    rollbacks = len(of_first_rank(path.rollbacks()))
    if resume is not None:
        rollbacks = max(rollbacks, read(resume).rollbacks)
    if start is not None:
        device_hours.raise_to(start.device_seconds)
    network = _network(plan, name, start, resume)
    if config.precision == "fp64":
        network.double()
    if config.compile:
        network.compile_blocks()
    network.fsdp_wrap_fn = parallel.is_unit  # pyright: ignore
    model = DiffusionModel(network, _objective(plan, name, rollbacks))
    begun = ""
    if dist.get_global_rank() == 0:
        if start is not None and (live := _live(StageFolder(start.path.parent))) is not None:
            start.require_weights(live)
        begun = run_folder.begin(plan, name)  # now that the weights are known to fit
        mirror.put_records(path)
        mirror.catch_up(path)
    averages = start.averages if start else None
    ema = EMA(model.dit, stage.averages(), stage.ema_start, averages)
    own = observers.callbacks(
        plan, name, path, begun, model, ema, rollbacks, device_hours, stop, mirror.put_checkpoint
    )
    trainer = _trainer(plan, name, path, model, [*own, *callbacks, stop], resume, rollbacks)
    stop.listen()  # Composer's handler is the last one otherwise
    if start is not None and stage.keep_moments:
        start.restore_moments(trainer.state)
    done = trainer.state.timestamp.batch.value
    say(f"stage {name}: {stage.steps} steps" + (f", goes on after {done}" if done else ""))
    for source in plan.data[name]:
        for reason, count in source.left_out.items():
            say(f"stage {name}: {source.name}: {count} pictures left out, {reason}")
    try:
        if done < stage.steps:
            trainer.fit()
        dataset: LatentText = trainer.state.train_dataloader.dataset  # pyright: ignore
        _export(plan, name, path, model, ema, dataset.damaged())
        if dist.get_global_rank() == 0:
            curve.draw(metrics_log.read(path.metrics), f"{config.name}, stage {name}", path.curve)
            mirror.put_weights(path)
            say(f"stage {name}: finished, weights in {config.run_folder() / run_folder.MODEL}")
        return None
    except RollBack as back:
        return back.with_traceback(None)
    except OSError as error:
        raise StorageError(
            f"stage {name}, in {path.path}: {error}; its last checkpoint is there, and the same "
            "command goes on from it"
        ) from error
    except RuntimeError as error:
        if not (why := loader_deaths.explained(error)):
            raise
        raise StorageError(f"stage {name}: {why}; then the same command goes on") from error
    finally:
        trainer.close()


def _live(finished: StageFolder) -> Path | None:
    """The file of a stage's live weights; None where somebody wanted the room of it."""
    if finished.live.exists():
        return finished.live
    return (
        finished.model if weights_metadata.read_metadata(finished.model).weights == "live" else None
    )


def _roll_back(plan: TrainingPlan, name: str, path: StageFolder, back: RollBack) -> None:
    """Records it, so that the next attempt has other random numbers.

    Raises:
        SettingError: the stage was rolled back to the same checkpoint often enough.
    """
    resume = path.checkpoints()[-1:]
    to = int(resume[0].stem.removeprefix("step-")) if resume else 0
    past = of_first_rank(path.rollbacks())
    same = sum(1 for _ in itertools.takewhile(lambda r: r["to"] == to, reversed(past)))
    if same >= plan.config.guard.rollbacks:
        raise SettingError(
            f"stage {name}, step {back.step}: {back.reason}, as it was before {same} roll-backs to "
            f"step {to} (guard.rollbacks={same}). Begin with a lower lr or harder clip in "
            f"another folder (folder=runs/NAME), or try on with guard.rollbacks={same + 3}"
        )
    say(
        f"stage {name}, step {back.step}: {back.reason}; back to step {to}, with other noise and "
        f"another order of the data (roll-back {same + 1} of {plan.config.guard.rollbacks})"
    )
    if dist.get_global_rank() == 0:
        path.add_rollback(back.step, to, back.reason)


def _objective(plan: TrainingPlan, name: str, rollbacks: int) -> Objective:
    config, stage = plan.config, plan.config.stages[name]
    denoiser = pkgutil.resolve_name(OBJECTIVES[config.objective])
    return Objective(
        denoiser=denoiser(**config.objective_settings(stage)),
        mask=stage.scheme(),
        mask_ratio=stage.mask_ratio,
        caption_drop=config.data.caption_drop,
        seed=config.seed,
        stage=stage_key(name, rollbacks),
        batch_size=stage.batch_size,
        rows=global_rows(),
    )


def _network(
    plan: TrainingPlan, name: str, start: CheckpointState | None, resume: Path | None
) -> MicroDiT:
    """The stage's network: initialised, or with the weights of the stage before, or, where a
    checkpoint of this stage will fill it, with arbitrary ones."""
    config = network_config(plan, plan.config.stages[name])
    if start is None and resume is None and plan.config.init_from:
        return _initial_network(plan, config)
    with torch.device("meta"):
        network = MicroDiT(config)
    network.to_empty(device="cpu")
    if start is None and resume is None:
        seed = keyed_seed(plan.config.seed, "weights")
        network.initialise(torch.Generator().manual_seed(seed))
        return network
    network.set_resolution(config.input_size, config.pos_interp_scale)  # fills the position table
    network.mask_token.zero_()
    if resume is not None:
        read(resume).check(network)
    if start is not None:
        start.restore_weights(network)
    return network


def _initial_network(plan: TrainingPlan, config: DiTConfig) -> MicroDiT:
    """The weights of `init_from`, with the positions of this run's resolution."""
    network, _ = weights_file.load(init_from.path(plan.config))
    network.set_resolution(config.input_size, config.pos_interp_scale)
    return network.train().requires_grad_(True)


def _trainer(
    plan: TrainingPlan,
    name: str,
    path: StageFolder,
    model: DiffusionModel,
    callbacks: Sequence[Callback],
    resume: Path | None,
    rollbacks: int,
) -> Trainer:
    config, stage = plan.config, plan.config.stages[name]
    device = get_device(None)
    dataset = make_dataset(plan, name, rollbacks=rollbacks)
    multiple = COMPILED_MULTIPLE if config.compile else 1
    loader = make_loader(dataset, config.data.workers, config.data.text == "trimmed", multiple)
    optimizer = make_optimizer(model, config.optimizer, stage.lr)
    loggers = make_loggers(config, path.path)
    precision = config.precision
    if precision == "auto":
        precision = "amp_bf16" if device.name == "gpu" else "fp32"
    elif precision == "fp64":
        precision = "fp32"  # as Composer calls it: no autocast
    elif precision == "amp_bf16" and device.name == "cpu":
        raise SettingError("precision=amp_bf16: Composer has it on GPUs only; use auto or fp32")
    try:
        return Trainer(
            model=model,
            train_dataloader=DataSpec(
                loader, get_num_samples_in_batch=lambda batch: len(batch["latents"])
            ),
            max_duration=f"{stage.steps}ba",
            optimizers=optimizer,
            callbacks=callbacks,
            loggers=loggers,
            parallelism_config=parallel.settings(config),
            run_name=f"{config.name}-{name}",
            progress_bar=False,
            spin_dataloaders=False,
            load_path="checkpoint.pt" if resume else None,
            load_object_store=Checkpoint(resume) if resume else None,
            load_progress_bar=False,
            device=device,
            precision=precision,
            device_train_microbatch_size=stage.microbatch or stage.batch_size // world_size(),
            seed=keyed_seed(config.seed, "global", name) % (1 << 31),
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what Composer makes of a checkpoint depends on what is in it
        if resume is None or isinstance(error, SettingError | StorageError):
            raise
        raise SettingError(
            f"cannot go on from {resume}: {' '.join(str(error).split())[:300]}; if the file is at "
            "fault, move it away to go on from the checkpoint before it, or from the beginning of "
            "the stage"
        ) from error


def _export(
    plan: TrainingPlan,
    name: str,
    path: StageFolder,
    model: DiffusionModel,
    ema: EMA,
    damaged: list[tuple[str, str]],
) -> None:
    """The finished stage's weights, the first average of them also as those of the run. All ranks
    gather them, the first writes.

    Args:
        damaged: shards that were skipped.
    """
    tensors = gathered(model.dit.state_dict())
    averages = {n: a["values"] for n, a in ema.state_dict()["averages"].items()}
    if dist.get_global_rank() > 0:
        return
    config, stage, sources = plan.config, plan.config.stages[name], plan.data[name]
    live = weights_file.WeightsMetadata(
        run=config.name,
        stage=name,
        step=stage.steps,
        weights="live",
        ema=None,
        **weights_file.facts(model.dit, model.objective.denoiser),
        resolution=stage.resolution,
        vae=sources[0].latents.vae,
        text_encoder=sources[0].text.text_encoder,
        text=config.data.text,
        captions=config.data.all_captions(),
        latents_manifests={source.name: source.latents for source in sources},
        text_manifests={source.name: source.text for source in sources},
        attribution=weights_file.attributions([source.name for source in sources]),
        config=config.model_dump(mode="json"),
        left_out=_left_out(sources, damaged),
    )
    if not stage.ema or stage.steps < stage.ema_start:
        weights_file.write(path.model, tensors, live)
    else:
        weights_file.write(path.live, tensors, live)
        # The first comes last: with it the stage is finished. One that has not begun, because the
        # last step was skipped, is the weights.
        for number, (average, profile) in reversed([*enumerate(stage.averages().items())]):
            kind = average if isinstance(profile, Power) else profile
            metadata = live.model_copy(update={"weights": "ema", "ema": kind})
            file = path.average(average) if number else path.model
            weights_file.write(file, {**tensors, **averages.get(average, {})}, metadata)
    run_folder.link_last(plan)  # a later stage may be finished


def _left_out(
    sources: list[TrainingSource], damaged: list[tuple[str, str]]
) -> dict[str, dict[str, int]]:
    """What metadata says of it."""
    found = {source.name: dict(source.left_out) for source in sources}
    for source, _ in damaged:
        found[source]["damaged shards"] = 1 + found[source].get("damaged shards", 0)
    return {name: counts for name, counts in found.items() if counts}

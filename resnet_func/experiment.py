"""A run from its description: load the data, build the network, train with checkpoints, resume, evaluate."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from resnet_func import augment, checkpoint, data, optim, recipes, run_folder, summary, tree, zoo
from resnet_func.losses import cross_entropy
from resnet_func.recipes import Recipe
from resnet_func.runtime import Runtime
from resnet_func.train import (
    Batches,
    EvalStep,
    Evaluation,
    Progress,
    Step,
    autocast,
    average_flips,
    evaluate,
    init_train_state,
    make_eval_step,
    make_train_step,
    train_epoch,
)
from resnet_func.types import Images, Model, Params, State, TrainState

EVAL_BATCH = 500


class TrainingError(Exception):
    """Training cannot go on; the message is one line with the way out."""


class Interrupted(Exception):  # noqa: N818, it is no error
    """The user stopped the run; its state is saved."""


class Reporter(Protocol):
    """Who is told how a run goes."""

    def note(self, text: str) -> None: ...
    def batch(self, progress: Progress, num_samples: int) -> None: ...
    def epoch(self, record: run_folder.Record) -> None: ...


@dataclass(frozen=True)
class Experiment:
    """All that decides a run's numbers, apart from the machine."""

    dataset: str
    data_dir: str | None
    seed: int
    recipe: Recipe


class Task(NamedTuple):
    """What a trained network is for: the classes it tells apart, and how its input is made."""

    classes: tuple[str, ...]
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int


def describe(experiment: Experiment, task: Task) -> dict[str, Any]:
    """What config.json holds: enough to resume, evaluate and predict."""
    return {"experiment": asdict(experiment), "task": task._asdict()}


def from_description(config: dict[str, Any]) -> tuple[Experiment, Task]:
    """The inverse of `describe`.

    Raises:
        RunError: a field is missing, unknown or out of range.
    """
    try:
        fields = dict(config["experiment"])
        experiment = Experiment(**{**fields, "recipe": Recipe(**fields["recipe"])})
        task = Task(**{k: tuple(v) if isinstance(v, list) else v for k, v in config["task"].items()})
    except (KeyError, TypeError, ValueError) as error:
        raise run_folder.RunError(f"config.json is not of this version: {error}. Start a new run") from error
    return experiment, task


# --------------------------------------------------------------------------- the parts


def load_data(experiment: Experiment, *, download: bool = True) -> data.Splits:
    """The run's training and test images."""
    directory = None if experiment.data_dir is None else Path(experiment.data_dir)
    # a folder may hold images of any size; other data sets are resized batch by batch
    size = experiment.recipe.image_size if experiment.dataset == "folder" else 0
    return data.load(experiment.dataset, directory, image_size=size or None, download=download)


def make_task(recipe: Recipe, splits: data.Splits) -> Task:
    """What the data set asks of the network."""
    channels, height, _ = splits.train.image_shape
    if recipe.normalization == "imagenet":
        if channels != 3:
            raise ValueError(
                f"normalization='imagenet' needs 3 channels; the images have {channels}. Use 'data'"
            )
        mean, std = recipes.IMAGENET_MEAN, recipes.IMAGENET_STD
    else:
        mean, std = (tuple(values.tolist()) for values in data.channel_statistics(splits.train))
    return Task(splits.train.classes, channels, mean, std, recipe.image_size or height)


def make_network(recipe: Recipe, task: Task) -> Model:
    """The recipe's network for the task."""
    return zoo.by_name(
        recipe.model,
        norm=recipe.norm,
        stem=recipe.stem,
        num_classes=len(task.classes),
        in_channels=task.in_channels,
    )


def make_optimizer(recipe: Recipe, total_steps: int) -> optim.Optimizer:
    """The recipe's optimizer and schedule for a run of `total_steps`."""
    schedule = _schedule(recipe, total_steps)
    decay = {"weight_decay": recipe.weight_decay, "decay_mask": _is_matrix}
    match recipe.optimizer:
        case "sgd":
            nesterov = recipe.momentum > 0
            optimizer = optim.sgd(schedule, momentum=recipe.momentum, nesterov=nesterov, **decay)
        case "adam":
            optimizer = optim.adam(schedule, **decay)
        case "adamw":
            optimizer = optim.adamw(schedule, **decay)
    return optim.clipped(optimizer, recipe.clip_norm) if recipe.clip_norm else optimizer


def _is_matrix(path: str) -> bool:
    """Whether weight decay applies: to weights of convolutions and linear layers, not to norms and biases."""
    *_, layer, name = path.split(".")
    return name == "weight" and (layer == "fc" or "conv" in layer or path.endswith("downsample.0.weight"))


def _schedule(recipe: Recipe, total_steps: int) -> optim.Schedule:
    peak = recipe.learning_rate
    match recipe.schedule:
        case "one-cycle":
            return optim.one_cycle(peak, total_steps, warmup_fraction=recipe.warmup)
        case "cosine":
            return optim.cosine(peak, total_steps, warmup_steps=int(recipe.warmup * total_steps))
        case "step":
            return optim.step(peak, [total_steps // 2, total_steps * 3 // 4], gamma=0.1)
        case "constant":
            return optim.constant(peak)


class Preparer:
    """Turns stored images into the network's input: float, normalised, resized, on the device."""

    def __init__(self, task: Task, runtime: Runtime) -> None:
        self.task, self.runtime = task, runtime
        self.mean, self.std = torch.tensor(task.mean), torch.tensor(task.std)

    def __call__(self, images: Tensor) -> Images:
        """Normalise `images` (uint8, `[N, C, H, W]`) and bring them to the task's size."""
        images = images.to(self.runtime.device)
        x = data.normalize(images, self.mean, self.std)
        x = augment.resize(x, self.task.image_size)
        return x.contiguous(memory_format=self.runtime.memory_format)


# --------------------------------------------------------------------------- batches


def _generator(device: torch.device | str, *seeds: int) -> torch.Generator:
    """A generator of its own for each tuple of seeds, so that any step can be redone alone."""
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


def train_batches(
    experiment: Experiment, source: data.Source, prepare: Preparer, epoch: int, first: int
) -> Batches:
    """The augmented batches of an epoch from batch `first` on; the same in every run of the experiment."""
    recipe, device = experiment.recipe, prepare.runtime.device
    changes = recipes.make_augment(recipe)
    small = recipe.early_size if epoch < recipe.early_epochs else 0
    order = torch.randperm(source.num_samples, generator=_generator("cpu", experiment.seed, 1, epoch))
    full = len(order) // recipe.batch_size
    picks = order.split(recipe.batch_size)[first:full]
    for index, (images, labels) in enumerate(source.read(picks), start=first):
        x = augment.apply(changes, prepare(images), _generator(device, experiment.seed, 2, epoch, index))
        if small:
            x = augment.resize(x, small).contiguous(memory_format=prepare.runtime.memory_format)
        yield x, labels.to(device)


def eval_batches(source: data.Source, prepare: Preparer) -> Batches:
    """All batches of a source in its own order, not augmented."""
    for images, labels in data.batches(source, EVAL_BATCH):
        yield prepare(images), labels.to(prepare.runtime.device)


# --------------------------------------------------------------------------- training


def train(
    experiment: Experiment,
    splits: data.Splits,
    folder: Path,
    runtime: Runtime,
    reporter: Reporter,
    *,
    resume: bool = False,
) -> list[dict[str, float]]:
    """Train the experiment in its folder, from the start or from its last checkpoint.

    Returns:
        The records of metrics.jsonl.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the run is saved after the step it was in.
        TrainingError: the loss is not finite, or the training set is smaller than a batch.
        CheckpointError, DataError, RunError: as their modules say.
    """
    recipe = experiment.recipe
    task = make_task(recipe, splits)
    steps_per_epoch = splits.train.num_samples // recipe.batch_size
    if not steps_per_epoch:
        raise TrainingError(
            f"batch_size {recipe.batch_size} is more than the {splits.train.num_samples} training images; "
            f"try --batch-size {min(32, splits.train.num_samples)}"
        )
    optimizer = make_optimizer(recipe, recipe.epochs * steps_per_epoch)
    model = make_network(recipe, task)
    step, eval_step = _make_steps(model, recipe, optimizer, runtime)
    train_state = _init(model, experiment, optimizer, runtime)
    progress, records = Progress(), []
    if resume:
        train_state, progress = _restore(folder, train_state, reporter)
        records = run_folder.read_metrics(folder)[: progress.epoch]
    else:
        run_folder.write_config(folder, describe(experiment, task))
    prepare = Preparer(task, runtime)
    with _deferred_interrupt() as interrupted:
        for epoch in range(progress.epoch, recipe.epochs):
            batches = train_batches(experiment, splits.train, prepare, epoch, progress.batch)
            steps = train_epoch(step, train_state, batches, progress, time.perf_counter)
            for train_state, progress in steps:
                reporter.batch(progress, steps_per_epoch * recipe.batch_size)
                _check_finite(progress, recipe)
                if interrupted():
                    _save(folder, train_state, progress)
                    raise Interrupted
            evaluation = evaluate(eval_step, *tested(train_state), eval_batches(splits.test, prepare))
            records.append(_record(epoch, progress, evaluation))
            progress = Progress(epoch + 1)
            _finish_epoch(folder, train_state, progress, records)
            reporter.epoch(records[-1])
            if interrupted() and epoch + 1 < recipe.epochs:
                raise Interrupted
    return records


def _finish_epoch(
    folder: Path, train_state: TrainState, progress: Progress, records: list[dict[str, float]]
) -> None:
    # metrics first: a crash in between leaves a line too many, which a resumed run drops and writes again
    run_folder.write_metrics(folder, records)
    _save(folder, train_state, progress)
    if records[-1]["test_accuracy"] >= max(record["test_accuracy"] for record in records):
        meta = {"epoch": progress.epoch}
        checkpoint.save(run_folder.checkpoints(folder), "best", tested(train_state), meta=meta)


def tested(train_state: TrainState) -> tuple[Params, State]:
    """The parameters and state to evaluate: the moving averages where they are kept."""
    if train_state.ema_params is None or train_state.ema_state is None:
        return train_state.params, train_state.state
    return train_state.ema_params, train_state.ema_state


def _make_steps(
    model: Model, recipe: Recipe, optimizer: optim.Optimizer, runtime: Runtime
) -> tuple[Step, EvalStep]:
    if runtime.precision == "bf16":
        model = autocast(model, runtime.device.type, torch.bfloat16)
    step = make_train_step(
        model,
        recipes.make_loss(recipe),
        optimizer,
        microbatches=recipe.microbatches,
        ema_decay=recipe.ema or None,
    )
    compiled = torch.compile(step, fullgraph=True, dynamic=False) if runtime.compile else step
    return compiled, make_eval_step(model, cross_entropy)


def _init(model: Model, experiment: Experiment, optimizer: optim.Optimizer, runtime: Runtime) -> TrainState:
    params, state = model.init(_generator("cpu", experiment.seed, 0), device=runtime.device)
    params = tree.map(lambda leaf: _as_format(leaf, runtime.memory_format), params)
    return init_train_state(params, state, optimizer, ema=experiment.recipe.ema > 0)


def _as_format(leaf: Tensor, memory_format: torch.memory_format) -> Tensor:
    return leaf.contiguous(memory_format=memory_format) if leaf.ndim == 4 else leaf


def _check_finite(progress: Progress, recipe: Recipe) -> None:
    if not math.isfinite(progress.loss_sum):
        raise TrainingError(
            f"the loss is {progress.loss_sum} at epoch {progress.epoch + 1}, batch {progress.batch}: "
            f"training diverged. Lower --learning-rate (it is {recipe.learning_rate}) or set --clip-norm 1"
        )


def _record(epoch: int, progress: Progress, evaluation: Evaluation) -> dict[str, float]:
    return {
        "epoch": epoch + 1,
        "train_loss": progress.loss_sum / progress.samples,
        "train_accuracy": progress.correct / progress.samples,
        "test_loss": evaluation.loss,
        "test_accuracy": evaluation.accuracy,
        "seconds": round(progress.seconds, 3),
        "images_per_second": round(progress.samples / progress.seconds, 1),
    }


def _save(folder: Path, train_state: TrainState, progress: Progress) -> None:
    meta = {"progress": progress._asdict()}
    checkpoint.save(run_folder.checkpoints(folder), "last", train_state, meta=meta)


def _restore(folder: Path, like: TrainState, reporter: Reporter) -> tuple[TrainState, Progress]:
    train_state, meta, warning = checkpoint.load(run_folder.checkpoints(folder), "last", like)
    if warning:
        reporter.note(warning)
    return train_state, Progress(**meta["progress"])


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag, so that the step it falls in is finished and saved."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------- a trained network


class Trained(NamedTuple):
    """A run's network with its parameters, and what it is for."""

    model: Model
    params: Params
    state: State
    task: Task
    experiment: Experiment


def load_trained(folder: Path, which: str, runtime: Runtime, *, flips: bool = False) -> Trained:
    """The network of a run at its "last" or "best" checkpoint; `flips` averages over mirrored images.

    Raises:
        RunError: the folder is not a run's.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    experiment, task = from_description(run_folder.read_config(folder))
    model = make_network(experiment.recipe, task)
    params, state = model.init(torch.Generator(), device=runtime.device)
    checkpoints = run_folder.checkpoints(folder)
    if which == "best":
        (params, state), _, _ = checkpoint.load(checkpoints, "best", (params, state))
    else:
        optimizer = make_optimizer(experiment.recipe, total_steps=2)
        like = init_train_state(params, state, optimizer, ema=experiment.recipe.ema > 0)
        params, state = tested(checkpoint.load(checkpoints, "last", like)[0])
    return Trained(average_flips(model) if flips else model, params, state, task, experiment)


def evaluate_trained(trained: Trained, source: data.Source, runtime: Runtime) -> Evaluation:
    """Losses and logits of a trained network on a source."""
    eval_step = make_eval_step(trained.model, cross_entropy)
    prepare = Preparer(trained.task, runtime)
    return evaluate(eval_step, trained.params, trained.state, eval_batches(source, prepare))


def predict(trained: Trained, images: list[Tensor], runtime: Runtime) -> Tensor:
    """Logits `[K, classes]` on the CPU of K images, uint8 `[C, H, W]` of the task's channels."""
    prepare = Preparer(trained.task, runtime)
    with torch.no_grad():
        x = torch.cat([prepare(image[None]) for image in images])
        logits, _ = trained.model.apply(trained.params, trained.state, x, train=False)
    return logits.cpu()


def read_image(path: Path, task: Task) -> Tensor:
    """One image file as uint8 `[C, H, W]` of the task's channels and size.

    Raises:
        DataError: the file is missing or no image.
    """
    rgb = torch.from_numpy(data.decode(str(path), task.image_size).copy())
    # ITU-R 601, as Pillow turns colour to grey
    weights = torch.tensor([0.299, 0.587, 0.114])
    grey = (rgb * weights[:, None, None]).sum(0, keepdim=True).round().to(torch.uint8)
    return grey if task.in_channels == 1 else rgb


def training_flops(experiment: Experiment, splits: data.Splits) -> float:
    """Floating-point operations of the run's forward and backward passes, six a multiply-accumulate."""
    recipe, source = experiment.recipe, splits.train
    model = zoo.by_name(
        recipe.model,
        norm=recipe.norm,
        stem=recipe.stem,
        num_classes=len(source.classes),
        in_channels=source.image_shape[0],
    )
    rows = summary.summarize(model, recipe.image_size or source.image_shape[1])
    return 6.0 * summary.totals(rows).macs * source.num_samples * recipe.epochs

"""An experiment as data, and its parts made from it: data, network, optimizer, batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnet_func import optim, tree
from resnet_func.app import data, recipes
from resnet_func.app.data import augment
from resnet_func.app.recipes import Recipe
from resnet_func.app.runtime import Runtime
from resnet_func.losses import smoothed_cross_entropy
from resnet_func.models import summary, winograd
from resnet_func.models.state_dicts import from_state_dict
from resnet_func.train import Batches, Step, autocast, init_train_state, make_train_step, to_memory_format
from resnet_func.types import Images, Model, Params, State, TrainState

DatasetName = Literal["digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "folder"]


@dataclass(frozen=True)
class Experiment:
    """What decides a run's numbers, apart from the machine; `init` is a file of parameters to start from."""

    dataset: DatasetName
    data_dir: str | None
    seed: int
    recipe: Recipe
    init: str | None = None

    @property
    def decode_size(self) -> int | None:
        """To what side an image file is decoded; None keeps its own size, and `Preparer` resizes it."""
        # only a folder's images may differ in size; other data sets are resized batch by batch
        return self.recipe.image_size or None if self.dataset == "folder" else None


class Task(NamedTuple):
    """What a trained network is for, and the data it was trained on.

    Attributes:
        classes: The classes it tells apart, in the order of its outputs.
        in_channels: 3 for colour, 1 for grey.
        mean, std: Of each channel, pixels counted in [0, 1]: how its input is normalised.
        image_size: Side of its square input in pixels.
        train_images, test_images: How many there were; 0 in runs of earlier versions.
    """

    classes: tuple[str, ...]
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    train_images: int = 0
    test_images: int = 0


# --------------------------------------------------------------------------- data


def load_data(experiment: Experiment, *, download: bool = True) -> data.Splits:
    """The run's training and test images.

    >>> load_data(Experiment("digits", None, 0, Recipe())).test.num_samples
    364

    Raises:
        DataError: the data is missing, damaged or ill-arranged.
    """
    directory = None if experiment.data_dir is None else Path(experiment.data_dir)
    return data.load(experiment.dataset, directory, image_size=experiment.decode_size, download=download)


def make_task(recipe: Recipe, splits: data.Splits) -> Task:
    """What the data set asks of the network; reads all training images for their statistics.

    Raises:
        ValueError: `recipe.normalization` is for other channels.
    """
    source = splits.train
    channels, height, width = source.image_shape
    if recipe.normalization == "imagenet":
        if channels != 3:
            raise ValueError(
                f"normalization='imagenet' needs 3 channels; the images have {channels}. Use 'data'"
            )
        mean, std = recipes.IMAGENET_MEAN, recipes.IMAGENET_STD
    else:
        mean, std = (tuple(values.float().tolist()) for values in data.channel_statistics(source))
    size = recipe.image_size or min(height, width)
    return Task(source.classes, channels, mean, std, size, source.num_samples, splits.test.num_samples)


def check_classes(task: Task, source: data.Source) -> None:
    """Refuse data with other classes or channels than the network was made for.

    Raises:
        DataError: says which, in one line.
    """
    if source.image_shape[0] != task.in_channels:
        raise data.DataError(
            f"{source.name}: images of {source.image_shape[0]} channel(s), where the network was made for "
            f"{task.in_channels}. Use the data it was trained on, or start a new run"
        )
    if source.classes != task.classes:
        added, missing = (
            ", ".join(sorted(set(a) - set(b))[:5])
            for a, b in ((source.classes, task.classes), (task.classes, source.classes))
        )
        names = [f"it has {added}" if added else "", f"it lacks {missing}" if missing else ""]
        difference = " and ".join(filter(None, names)) or "they come in another order"
        raise data.DataError(
            f"{source.name} has other classes than the network was made for: {difference}. "
            "Use the data it was trained on, or start a new run"
        )


def describe_changes(recorded: Task, found: Task) -> str | None:
    """What is different about the data since the run began, as one line; None if nothing is.

    >>> task = Task(("a", "b"), 3, (0.5,) * 3, (0.2,) * 3, 32, train_images=90, test_images=10)
    >>> describe_changes(task, task._replace(train_images=45))
    'the data have changed since the run began: 45 training images instead of 90'
    """
    changes = [
        f"{now} {what} instead of {before}"
        for what, now, before in (
            ("training images", found.train_images, recorded.train_images),
            ("test images", found.test_images, recorded.test_images),
            ("pixels a side", found.image_size, recorded.image_size),
        )
        if before and now != before
    ]
    # of so many images a stream measures a part, a data set in memory all
    tolerance = 0.01 if found.train_images > data.STREAM_STATISTICS_IMAGES else 0.0
    pairs = zip(found.mean + found.std, recorded.mean + recorded.std, strict=True)
    if any(abs(now - before) > tolerance for now, before in pairs):
        changes.append("other pixels on average")
    return f"the data have changed since the run began: {', '.join(changes)}" if changes else None


# --------------------------------------------------------------------------- the parts


class Parts(NamedTuple):
    """What a run is made of: the network, one training step, and where training starts."""

    model: Model
    step: Step
    train_state: TrainState


def make_parts(experiment: Experiment, task: Task, runtime: Runtime) -> Parts:
    """Make the network, the step, compiled where the runtime says so, and the state before the first step.

    Raises:
        ValueError: the recipe's schedule needs more steps.
    """
    recipe = experiment.recipe
    model = make_network(recipe, task, runtime)
    params, state = start(experiment, model, runtime)
    optimizer = make_optimizer(recipe, recipe.epochs * (task.train_images // recipe.batch_size), params)
    step = make_train_step(
        model,
        smoothed_cross_entropy(recipe.label_smoothing),
        optimizer,
        microbatches=recipe.microbatches,
        ema_decay=recipe.ema or None,
    )
    if runtime.compile:
        step = torch.compile(step, fullgraph=True, dynamic=False)
    return Parts(model, step, init_train_state(params, state, optimizer, ema=recipe.ema > 0))


def start(experiment: Experiment, model: Model, runtime: Runtime) -> tuple[Params, State]:
    """Fresh parameters and state, or those of a file, with a fresh head where the file's does not fit.

    Raises:
        ValueError, OSError: the file does not hold this network's parameters, or cannot be read.
    """
    generator = make_generator("cpu", experiment.seed, 0)
    if experiment.init is None:
        params, state = model.init(generator, device=runtime.device)
    else:
        into = {"device": runtime.device, "dtype": torch.float32}
        try:
            params, state = from_state_dict(model, experiment.init, **into)
        except ValueError:
            params, state = from_state_dict(model, experiment.init, head="new", generator=generator, **into)
    return to_memory_format(params, runtime.memory_format), state


def make_network(recipe: Recipe, task: Task, runtime: Runtime) -> Model:
    """The recipe's network for the task, as the machine computes it."""
    return compute_by(runtime, recipe.network(len(task.classes), task.in_channels))


def compute_by(runtime: Runtime, model: Model) -> Model:
    """The model by the algorithm and in the precision of the runtime."""
    if runtime.winograd:
        model = winograd.wrap(model)
    return autocast(model, runtime.device.type, torch.bfloat16) if runtime.precision == "bf16" else model


def make_optimizer(recipe: Recipe, total_steps: int, params: Params) -> optim.Optimizer:
    """The recipe's optimizer and schedule for a run of `total_steps`.

    Weights of two dimensions and more decay, norms and biases do not. Muon takes them, too, but the last: the
    head. Of `params` only the shapes are read.

    Raises:
        ValueError: the schedule needs more steps.
    """
    if total_steps < 2 and recipe.schedule == "one-cycle":
        raise ValueError(
            "schedule one-cycle needs 2 steps or more; this run has one. Raise --epochs, lower --batch-size, "
            "or try --schedule constant"
        )
    schedule = _schedule(recipe, recipe.learning_rate, total_steps)
    matrices = [path for path, leaf in tree.flatten(params).items() if leaf.ndim >= 2]
    decay = {"weight_decay": recipe.weight_decay, "decay_mask": set(matrices).__contains__}
    momentum = {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0}
    match recipe.optimizer:
        case "sgd":
            optimizer = optim.sgd(schedule, **momentum, **decay)
        case "muon":
            rest = optim.sgd(_schedule(recipe, recipe.rest_learning_rate, total_steps), **momentum)
            chosen = optim.muon(schedule, weight_decay=recipe.weight_decay, **momentum)
            optimizer = optim.partition(set(matrices[:-1]).__contains__, chosen, rest)
        case "adam":
            optimizer = optim.adam(schedule, **decay)
        case "adamw":
            optimizer = optim.adamw(schedule, **decay)
    return optim.clipped(optimizer, recipe.clip_norm) if recipe.clip_norm else optimizer


def _schedule(recipe: Recipe, peak: float, total_steps: int) -> optim.Schedule:
    match recipe.schedule:
        case "one-cycle":
            return optim.one_cycle(peak, total_steps, warmup_fraction=recipe.warmup)
        case "cosine":
            return optim.cosine(peak, total_steps, warmup_steps=int(recipe.warmup * total_steps))
        case "step":
            return optim.step(peak, [total_steps // 2, total_steps * 3 // 4], gamma=0.1)
        case "constant":
            return optim.constant(peak)


# --------------------------------------------------------------------------- batches


class Preparer:
    """Turns stored images into the network's input, in training, evaluation and prediction alike.

    The centre square of what is not square, normalised, resized to the task's size, in float32, on the
    runtime's device and in its memory format.
    """

    def __init__(self, task: Task, runtime: Runtime) -> None:
        self.task, self.runtime = task, runtime
        self.mean = torch.tensor(task.mean, dtype=torch.float32, device=runtime.device)
        self.std = torch.tensor(task.std, dtype=torch.float32, device=runtime.device)

    def __call__(self, images: Tensor) -> Images:
        """Prepare uint8 images `[N, C, H, W]`."""
        height, width = images.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        images = images[:, :, top : top + side, left : left + side].to(self.runtime.device)
        return self.scale(data.normalize(images, self.mean, self.std), 1.0)

    def scale(self, x: Images, scale: float) -> Images:
        """Resize to `scale` times the task's size, in the runtime's memory format."""
        x = augment.resize(x, max(1, round(scale * self.task.image_size)))
        return x.contiguous(memory_format=self.runtime.memory_format)


def make_generator(device: torch.device | str, *seeds: int) -> torch.Generator:
    """A generator of its own for each tuple of seeds, so that any step can be redone alone.

    >>> make_generator("cpu", 0, 1).initial_seed() == make_generator("cpu", 0, 2).initial_seed()
    False
    """
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


def train_batches(
    experiment: Experiment, source: data.Source, prepare: Preparer, epoch: int, first: int
) -> Batches:
    """The augmented batches of an epoch from batch `first` on; the same in every run of the experiment."""
    recipe, device = experiment.recipe, prepare.runtime.device
    shuffle = make_generator("cpu", experiment.seed, 1, epoch)
    order = torch.randperm(source.num_samples, generator=shuffle, device="cpu")
    full = len(order) // recipe.batch_size
    picks = order.split(recipe.batch_size)[first:full]
    for index, (images, labels) in enumerate(source.read(picks), start=first):
        draws = make_generator(device, experiment.seed, 2, epoch, index)
        x = augment.apply(recipe.augment, prepare(images), draws)
        yield prepare.scale(x, recipe.scale_at(epoch)), labels.to(device)


def evaluation_batches(recipe: Recipe, source: data.Source, prepare: Preparer, epoch: int) -> Batches:
    """All batches of a source in its own order, not augmented, at the size that the epoch trains at."""
    for images, labels in data.batches(source, recipe.evaluation_batch):
        yield prepare.scale(prepare(images), recipe.scale_at(epoch)), labels.to(prepare.runtime.device)


def training_flops(experiment: Experiment, splits: data.Splits) -> float:
    """Floating-point operations of the run's forward and backward passes, six a multiply-accumulate."""
    recipe, source = experiment.recipe, splits.train
    channels, height, width = source.image_shape
    model, size = recipe.network(len(source.classes), channels), recipe.image_size or min(height, width)
    params, state = model.init(torch.Generator("cpu"), device="cpu")
    rows = summary.summarize_network(model, params, state, (channels, size, size))
    full_epochs = sum(recipe.scale_at(epoch) ** 2 for epoch in range(recipe.epochs))
    return 6.0 * summary.totals(rows).macs * source.num_samples * full_epochs

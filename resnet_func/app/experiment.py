"""An experiment as data, and its parts made from it: data, network, optimizer, batches."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnet_func import optim
from resnet_func.app import data, recipes, run_folder
from resnet_func.app.data import augment
from resnet_func.app.recipes import Recipe
from resnet_func.app.runtime import Runtime
from resnet_func.models import summary, zoo
from resnet_func.train import Batches
from resnet_func.types import Images, Model

EVAL_BATCH = 500


DatasetName = Literal["digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "folder"]


@dataclass(frozen=True)
class Experiment:
    """All that decides a run's numbers, apart from the machine."""

    dataset: DatasetName
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
        recipe = Recipe(**{name: _tuples(value) for name, value in fields.pop("recipe").items()})
        experiment = Experiment(**fields, recipe=recipe)
        task = Task(**{name: _tuples(value) for name, value in config["task"].items()})
    except (KeyError, TypeError, ValueError) as error:
        raise run_folder.RunError(f"config.json is not of this version: {error}. Start a new run") from error
    return experiment, task


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


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
    schedule = _schedule(recipe, recipe.learning_rate, total_steps)
    decay = {"weight_decay": recipe.weight_decay, "decay_mask": _is_matrix}
    momentum = {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0}
    match recipe.optimizer:
        case "sgd":
            optimizer = optim.sgd(schedule, **momentum, **decay)
        case "muon":
            rest = optim.sgd(_schedule(recipe, recipe.rest_learning_rate, total_steps), **momentum)
            chosen = optim.muon(schedule, weight_decay=recipe.weight_decay, **momentum)
            optimizer = optim.partition(_is_convolution, chosen, rest)
        case "adam":
            optimizer = optim.adam(schedule, **decay)
        case "adamw":
            optimizer = optim.adamw(schedule, **decay)
    return optim.clipped(optimizer, recipe.clip_norm) if recipe.clip_norm else optimizer


def _is_matrix(path: str) -> bool:
    """Whether weight decay applies: to weights of convolutions and linear layers, not to norms and biases."""
    return path == "fc.weight" or _is_convolution(path)


def _is_convolution(path: str) -> bool:
    *_, layer, name = path.split(".")
    return name == "weight" and ("conv" in layer or path.endswith("downsample.0.weight"))


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


class Preparer:
    """Turns stored images into the network's input: float, normalised, resized, on the device."""

    def __init__(self, task: Task, runtime: Runtime) -> None:
        self.task, self.runtime = task, runtime
        self.mean, self.std = torch.tensor(task.mean), torch.tensor(task.std)

    def __call__(self, images: Tensor) -> Images:
        """Normalise `images` (uint8, `[N, C, H, W]`) and bring them to the task's size."""
        images = images.to(self.runtime.device)
        x = data.normalize(images, self.mean, self.std)
        return self.scale(x, 1.0)

    def scale(self, x: Images, scale: float) -> Images:
        """Resize to `scale` times the task's size, in the runtime's memory format."""
        x = augment.resize(x, max(1, round(scale * self.task.image_size)))
        return x.contiguous(memory_format=self.runtime.memory_format)


# --------------------------------------------------------------------------- batches


def make_generator(device: torch.device | str, *seeds: int) -> torch.Generator:
    """A generator of its own for each tuple of seeds, so that any step can be redone alone."""
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


def train_batches(
    experiment: Experiment, source: data.Source, prepare: Preparer, epoch: int, first: int
) -> Batches:
    """The augmented batches of an epoch from batch `first` on; the same in every run of the experiment."""
    recipe, device = experiment.recipe, prepare.runtime.device
    changes = recipes.make_augment(recipe)
    order = torch.randperm(source.num_samples, generator=make_generator("cpu", experiment.seed, 1, epoch))
    full = len(order) // recipe.batch_size
    picks = order.split(recipe.batch_size)[first:full]
    for index, (images, labels) in enumerate(source.read(picks), start=first):
        x = augment.apply(changes, prepare(images), make_generator(device, experiment.seed, 2, epoch, index))
        yield prepare.scale(x, recipe.scale_at(epoch)), labels.to(device)


def test_batches(experiment: Experiment, source: data.Source, prepare: Preparer, epoch: int) -> Batches:
    """All batches of a source in its own order, not augmented, at the size that the epoch trains at."""
    scale = experiment.recipe.scale_at(epoch)
    for images, labels in data.batches(source, EVAL_BATCH):
        yield prepare.scale(prepare(images), scale), labels.to(prepare.runtime.device)


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
    full_epochs = sum(recipe.scale_at(epoch) ** 2 for epoch in range(recipe.epochs))
    return 6.0 * summary.totals(rows).macs * source.num_samples * full_epochs

"""The data of an experiment: its task, checks against an earlier run, and the batches."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resnet_func.app import data, recipes
from resnet_func.app.data import augment, members
from resnet_func.app.experiment import Experiment, Task
from resnet_func.app.recipes import Recipe
from resnet_func.app.runtime import Runtime
from resnet_func.app.training_set import Training, prepare
from resnet_func.distributed import Ranks
from resnet_func.train import Batches
from resnet_func.types import Images

ONE_RANK = Ranks(0, 1)


def load_data(experiment: Experiment, *, download: bool = True) -> data.Splits:
    """The run's training and test images; of the training images, what the experiment makes of them.

    >>> load_data(Experiment("digits", None, 0, Recipe())).test.num_samples
    364

    Raises:
        DataError: the data is missing, damaged or ill-arranged.
        AppError: the scores to choose by cannot be read, or are of other data.
    """
    training, test = load_training(experiment, download=download)
    return data.Splits(training.source, test)


def load_training(experiment: Experiment, *, download: bool = True) -> tuple[Training, data.Source]:
    """`load_data`, with what is known of the training images: their places, and which labels are planted."""
    directory = None if experiment.data_dir is None else Path(experiment.data_dir)
    splits = data.load(experiment.dataset, directory, image_size=experiment.decode_size, download=download)
    return prepare(experiment.training_set, splits.train, experiment.seed), splits.test


def make_task(recipe: Recipe, splits: data.Splits) -> Task:
    """What the data set asks of the network; reads all training images, if their statistics are wanted.

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
    elif recipe.normalization == "fixed":
        mean, std = (0.5,) * channels, (0.25,) * channels
    else:
        mean, std = (tuple(values.float().tolist()) for values in data.channel_statistics(source))
    size = recipe.image_size or min(height, width)
    counts = source.num_samples, splits.test.num_samples
    return Task(source.classes, channels, mean, std, size, *counts, digest_files(splits))


def digest_files(splits: data.Splits) -> str:
    """A digest of every image's class, of its file's name and size where it has one, and of an image a class.

    Cheap: of the files, one a class is read. The same where a folder was moved or copied; another where two
    class folders have swapped their images.

    >>> digest_files(data.load("digits")) == digest_files(data.load("digits"))
    True
    """
    digest = hashlib.sha256()
    for source in splits:
        labels = source.labels.tolist()
        first_of_class = {label: place for place, label in reversed(list(enumerate(labels)))}
        for place, label in enumerate(labels):
            file = source.files[place] if source.files else None
            found = None if file is None else members.facts(file)
            name = "" if found is None else f"{found.name} {found.size}"
            digest.update(f"{label} {name}\n".encode(errors="surrogateescape"))
            if first_of_class[label] != place:
                continue
            if file is not None:
                digest.update(members.read(file))
            elif isinstance(source, data.Dataset):
                digest.update(source.images[place].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


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
    if not changes and recorded.files and found.files != recorded.files:
        changes.append("other files in the classes")
    return f"the data have changed since the run began: {', '.join(changes)}" if changes else None


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
    experiment: Experiment,
    source: data.Source,
    prepare: Preparer,
    epoch: int,
    first: int,
    ranks: Ranks = ONE_RANK,
) -> Batches:
    """The augmented batches of an epoch from batch `first` on, or a rank's part of each.

    The same in every run of the experiment: what happens to an image depends on the seed, the epoch and its
    place in the batch, not on the rank that has it.
    """
    recipe, device = experiment.recipe, prepare.runtime.device
    shuffle = make_generator("cpu", experiment.seed, 1, epoch)
    order = data.shuffled(source.num_samples, shuffle, experiment.shuffle_window)
    full, changes = len(order) // recipe.batch_size, augment.Augment(recipe.crop, recipe.flip, recipe.cutout)
    part = augment.Part(ranks.part(recipe.batch_size), recipe.batch_size)
    picks = [pick[part.rows] for pick in order.split(recipe.batch_size)[first:full]]
    for index, (images, labels) in enumerate(source.read(picks), start=first):
        draws = make_generator(device, experiment.seed, 2, epoch, index)
        x = augment.apply(changes, prepare(images), draws, part)
        yield prepare.scale(x, recipe.scale_at(epoch)), labels.to(device)


def evaluation_batches(
    recipe: Recipe, source: data.Source, prepare: Preparer, epoch: int, ranks: Ranks = ONE_RANK
) -> Batches:
    """The batches of a source in its own order, not augmented, at the size that the epoch trains at.

    All, or those that are dealt to a rank in turn: whole ones, so that kernels compute as in one process.
    """
    order = torch.arange(source.num_samples, dtype=torch.int64, device="cpu").split(recipe.evaluation_batch)
    for images, labels in source.read(order[ranks.rank :: ranks.world]):
        yield prepare.scale(prepare(images), recipe.scale_at(epoch)), labels.to(prepare.runtime.device)

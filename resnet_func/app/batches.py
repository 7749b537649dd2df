"""The batches of an experiment: stored images made the network's input, in training and evaluation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from resnet_func.app import data
from resnet_func.app.data import augment
from resnet_func.app.experiment import Experiment, Task
from resnet_func.app.recipes import Recipe
from resnet_func.app.runtime import Runtime
from resnet_func.distributed import Ranks
from resnet_func.train import Batches
from resnet_func.types import Images

ONE_RANK = Ranks(0, 1)


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
    mirrored = augment.mirrored_in(epoch, source.num_samples, make_generator("cpu", experiment.seed, 3))
    read = zip(picks, source.read(picks), strict=True)
    for index, (pick, (images, labels)) in enumerate(read, start=first):
        draws = make_generator(device, experiment.seed, 2, epoch, index)
        x = augment.apply(changes, prepare(images), draws, part, mirrored[pick])
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

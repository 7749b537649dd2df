"""An experiment and its task as data: what decides a run's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from resnet_func.app.recipes import Recipe

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

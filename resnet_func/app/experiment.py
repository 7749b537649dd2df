"""An experiment, its task and the plan of its run as data: what decides a run's numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from resnet_func.app.recipes import Recipe

if TYPE_CHECKING:  # they import torch, which a refused option does not wait for
    from resnet_func.app.data import Splits
    from resnet_func.app.private.guarantee import Budget
    from resnet_func.app.runtime import Runtime

SEEDS = 2**63  # from 0 to below this: what torch's generators take

DatasetName = Literal["digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "folder", "shards"]


Neighbours = Literal["add-or-remove-one", "replace-one"]
Sampling = Literal["poisson", "fixed-size"]
PrivateClipping = Literal["flat", "per_layer", "automatic", "adaptive"]


@dataclass(frozen=True)
class Privacy:
    """The guarantee of a private run, and how it is kept; the seeds of its noise are elsewhere.

    Attributes:
        epsilon, delta: What the whole run may spend.
        noise_multiplier: Of every step's noise, calibrated for that.
        max_norm: Bound on one image's gradient; of "adaptive" clipping where it starts.
        clipping: As in `per_sample.clipped_sum`, or "adaptive" (`privacy.AdaptiveNorm`).
        views: Augmented views of an image, whose gradients are averaged before they are clipped.
        sampling, neighbours: As in `privacy.epsilon`.
        diagnostics: Whether to write metrics that are not private.
        insecure: Whether the seeds came from an option, so that there is no guarantee.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    max_norm: float = 1.0
    clipping: PrivateClipping = "flat"
    views: int = 1
    sampling: Sampling = "poisson"
    neighbours: Neighbours = "add-or-remove-one"
    diagnostics: bool = False
    insecure: bool = False

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("epsilon", 0 < self.epsilon < math.inf, "above 0 and finite"),
            ("delta", 0 < self.delta < 1, "in (0, 1)"),
            ("noise_multiplier", 0 <= self.noise_multiplier < math.inf, "0 or more and finite"),
            ("max_norm", 0 < self.max_norm < math.inf, "above 0 and finite"),
            ("views", self.views >= 1, "1 or more"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {expected}; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """What is done to the training images before training.

    Attributes:
        corrupt: Share of the training labels to replace by wrong ones, to see whether `scores` finds them.
        corrupt_seed: Of which labels, and by what: not that of the run, so that runs can be averaged.
        keep: Share of the training images to train on.
        which: What is kept: those that are hard by a score, those that are easy, or any.
        by: The score, a column of the file of scores.
        scores: The scores.csv of a run on the same data, which `scores` wrote.
    """

    corrupt: float = 0.0
    corrupt_seed: int = 0
    keep: float = 1.0
    which: Literal["hard", "easy", "random"] = "hard"
    by: str = "el2n"
    scores: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.corrupt <= 1:
            raise ValueError(f"corrupt must be a share from 0 to 1; got {self.corrupt}")
        if not 0 <= self.corrupt_seed < SEEDS:
            raise ValueError(f"corrupt_seed must be 0 or more, below 2 ** 63; got {self.corrupt_seed}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be a share above 0, up to 1; got {self.keep}")
        if self.keep < 1 and self.which != "random" and not self.scores:
            raise ValueError(
                "keep needs a file of scores to choose by: pass --scores RUN/scores.csv, which "
                "`resnet-func scores RUN` writes, or --which random"
            )


@dataclass(frozen=True)
class Experiment:
    """What decides a run's numbers, apart from the machine, and what it leaves behind.

    `init` is a file of parameters to start from; `snapshots` the number of epochs, evenly spaced, after which
    the network is kept; `record` says whether a record is kept of which training images are right;
    `shuffle_window` how many images that lie together are shuffled together, 0 for all.
    """

    dataset: DatasetName
    data_dir: str | None
    seed: int
    recipe: Recipe
    init: str | None = None
    training_set: TrainingSet = TrainingSet()
    snapshots: int = 0
    record: bool = False
    privacy: Privacy | None = None
    shuffle_window: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed must be 0 or more, below 2 ** 63; got {self.seed}")
        for name in ("snapshots", "shuffle_window"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more; got {getattr(self, name)}")

    @property
    def decode_size(self) -> int | None:
        """To what side an image file is decoded; None keeps its own size, and `Preparer` resizes it."""
        # only image files may differ in size; other data sets are resized batch by batch
        return self.recipe.image_size or None if self.dataset in ("folder", "shards") else None


class Task(NamedTuple):
    """What a trained network is for, and the data it was trained on.

    Attributes:
        classes: The classes it tells apart, in the order of its outputs.
        in_channels: 3 for colour, 1 for grey.
        mean, std: Of each channel, pixels counted in [0, 1]: how its input is normalised.
        image_size: Side of its square input in pixels.
        train_images, test_images: How many there were; 0 in runs of earlier versions.
        files: A digest of which images are in which class; "" in runs of earlier versions.
    """

    classes: tuple[str, ...]
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    train_images: int = 0
    test_images: int = 0
    files: str = ""


class Plan(NamedTuple):
    """A run before its first step: nothing is left to decide, and all ranks have decided alike.

    Attributes:
        experiment: With its batch, its epochs and its noise.
        splits: The images.
        task: What they ask of the network, or, where a run goes on, asked when it began.
        machine: With the choice whether to compile.
        budget: What a private run may spend.
        lines: What a user is told of all this.
    """

    experiment: Experiment
    splits: Splits
    task: Task
    machine: Runtime
    budget: Budget | None = None
    lines: tuple[str, ...] = ()

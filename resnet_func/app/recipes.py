"""Recipes: how a network is trained, as frozen data.

Imports no torch, so that a wrong option is refused at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from resnet_func.models import variants

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

RecipeName = Literal["fast", "article", "private"]
ActivationOrder = Literal["auto", "conv-norm-relu", "conv-relu-norm", "norm-relu-conv", "relu-norm-conv"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network and how to train it.

    Attributes:
        model: A network of the zoo, torchvision:NAME, timm:NAME, FILE.py:CALLABLE or pkg.mod:CALLABLE.
        norm: The normalisation layers of the network.
        stem: The first layers: "cifar" keeps the resolution, "imagenet" divides it by four.
        activation_order: What goes round each convolution of a block, in order; "auto" is the block's own.
        standardize: Standardise the filters of every convolution, each with a gain and a bias.
        epochs: Passes over the training set; 0 is as many as fit into `minutes`.
        minutes: How long a run shall take, from start to end, where `epochs` is 0.
        batch_size: Images a step.
        optimizer: sgd (Nesterov), adam, adamw, or muon: for the convolutions, with sgd for the rest.
        learning_rate: The highest learning rate of the schedule.
        rest_learning_rate: The same for what muon leaves to sgd: norms, biases and the last layer.
        schedule: one-cycle (linear up and down), cosine, step (a tenth after 50 and 75 %) or constant.
        warmup: Share of the steps in which the learning rate climbs; one-cycle and cosine.
        momentum: Momentum of sgd and muon.
        weight_decay: L2 penalty of weights, decoupled for adamw and muon. Norms and biases are not decayed,
            nor is what muon leaves to sgd.
        label_smoothing: Weight of the uniform distribution in the targets.
        clip_norm: Largest global norm of the gradient; 0 is no clipping.
        ema: Decay of the moving average of the parameters, which is what gets tested; 0 is no average.
        microbatches: Pieces each batch, or each rank's part of it, is cut into to bound memory.
        sync_batchnorm: Under torchrun, take BatchNorm's statistics over the parts of all ranks, one
            all-reduce a layer; else each rank's part of a batch is a batch of its own to it.
        crop: Pixels of padding before a random crop.
        flip: Mirror each training image in every second epoch, a drawn half of them in the first. With
            differential privacy each time with probability one half.
        test_flips: Test and predict by the average over each image and its mirror image.
        cutout: Side of the square blanked in each training image.
        image_size: Resize all images to this side; 0 keeps the data set's own.
        early_scales: Pairs (scale, share): for this share of the epochs, train on images scaled down by
            `scale`, and test at that size; one pair after the other, then at full size, as at least the
            last epoch always is.
        normalization: Mean and standard deviation: of the training images ("data"), ImageNet's, or "fixed":
            0.5 and 0.25, whatever the images.
    """

    model: str = "resnet20"
    norm: Literal["batch", "group", "none"] = "batch"
    stem: Literal["cifar", "imagenet"] = "cifar"
    activation_order: ActivationOrder = "auto"
    standardize: bool = False
    epochs: int = 10
    minutes: float = 0.0
    batch_size: int = 128
    optimizer: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    learning_rate: float = 0.3
    rest_learning_rate: float = 0.3
    schedule: Literal["one-cycle", "cosine", "step", "constant"] = "one-cycle"
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    ema: float = 0.0
    microbatches: int = 1
    sync_batchnorm: bool = False
    crop: int = 4
    flip: bool = True
    test_flips: bool = False
    cutout: int = 0
    image_size: int = 0
    early_scales: tuple[tuple[float, float], ...] = ()
    normalization: Literal["data", "imagenet", "fixed"] = "data"

    def __post_init__(self) -> None:
        if self.epochs == 0 and self.minutes == 0:
            raise ValueError("epochs must be 1 or more; got 0. Or give the run --minutes")
        for name in ("batch_size", "microbatches"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("epochs", "crop", "cutout", "image_size", "clip_norm"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("minutes", "learning_rate", "rest_learning_rate", "weight_decay"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        for name in ("momentum", "label_smoothing", "ema"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        if self.image_size:
            size = f"below --image-size {self.image_size}"
            self._check("crop", self.crop < self.image_size, size)
            self._check("cutout", self.cutout <= self.image_size, size.replace("below", "up to"))
        self._check("warmup", 0 <= self.warmup < 1, "a share of the steps, in [0, 1)")
        if any(not (0 < scale <= 1 and 0 <= share <= 1) for scale, share in self.early_scales):
            raise ValueError(
                "early_scales are pairs (scale in (0, 1], share of the epochs in [0, 1]); "
                f"got {self.early_scales}. Try 0.5 0.6 0.75 0.2"
            )
        if ":" in self.model:
            from resnet_func.models.interop.load import (
                find_callable,  # imports torch, and the network's package
            )

            find_callable(self.model)
        else:
            variants.config(self.model, **self.network_changes)

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {expected}; got {getattr(self, name)}")

    @property
    def network_changes(self) -> variants.ConfigChanges:
        """What the recipe changes of a network of the zoo.

        >>> Recipe(norm="group").network_changes
        {'norm': 'group', 'stem': 'cifar'}
        """
        changes: variants.ConfigChanges = {"norm": self.norm, "stem": self.stem}
        if self.activation_order != "auto":
            changes["activation_order"] = self.activation_order
        if self.standardize:
            changes["weight_standardization"] = changes["standardization_affine"] = True
        return changes

    @cached_property
    def evaluation_batch(self) -> int:
        """Images that are evaluated or predicted at a time: those of a micro-batch, 500 at most.

        What trains in memory so evaluates in it, too; and the run, `evaluate` and `predict` agree to the bit.

        >>> Recipe(batch_size=128, microbatches=3).evaluation_batch
        43
        """
        return min(500, math.ceil(self.batch_size / self.microbatches))

    def epochs_by_scale(self) -> dict[float, int]:
        """How many epochs are of each scale.

        >>> Recipe(epochs=4, early_scales=((0.5, 0.5),)).epochs_by_scale()
        {0.5: 2, 1.0: 2}
        """
        counts, end, last = {scale: 0 for scale, _ in self.early_scales}, 0.0, 0
        for scale, share in self.early_scales:
            end += share
            stop = max(last, min(round(end * self.epochs), self.epochs - 1))
            counts[scale], last = counts[scale] + stop - last, stop
        counts[1.0] = counts.get(1.0, 0) + self.epochs - last
        return {scale: count for scale, count in counts.items() if count}

    def scale_at(self, epoch: int) -> float:
        """By how much the images of an epoch (from 0) are scaled.

        >>> [Recipe(epochs=4, early_scales=((0.5, 0.5),)).scale_at(epoch) for epoch in range(4)]
        [0.5, 0.5, 1.0, 1.0]
        """
        end = 0.0
        for scale, share in self.early_scales:
            end += share
            if epoch < min(round(end * self.epochs), self.epochs - 1):
                return scale
        return 1.0


STEPS_OF_SMALL = 8  # at least, in an epoch over a small data set
SMALL_BATCH = 8  # of which BatchNorm's statistics still say something

FAST = Recipe(
    model="resnet10",
    epochs=0,
    minutes=20,
    batch_size=512,
    optimizer="muon",
    learning_rate=0.15,
    weight_decay=0.05,
    warmup=0.15,
    label_smoothing=0.1,
    crop=2,
    test_flips=True,
    early_scales=((0.5, 0.42), (0.75, 0.33)),
)
"""The most accuracy for 20 minutes, on whatever machine, for small colour images."""

DIGITS = Recipe(epochs=20, batch_size=64, warmup=0.15, crop=1, flip=False)
"""The same for 8x8 grey digits, which must not be mirrored; muon's products cost more than such images."""

ARTICLE = Recipe(
    model="resnet18",
    stem="imagenet",
    epochs=10,
    batch_size=64,
    optimizer="adam",
    learning_rate=1e-3,
    schedule="constant",
    weight_decay=0.0,
    crop=0,
    flip=False,
    image_size=224,
    normalization="imagenet",
)
"""The textbook way: ResNet-18 made for ImageNet, on images resized to 224 pixels, with Adam."""

PRIVATE = Recipe(
    model="wrn_10_2",
    norm="group",
    activation_order="conv-relu-norm",
    epochs=56,
    batch_size=1024,
    learning_rate=4.0,
    warmup=0.05,
    momentum=0.0,
    weight_decay=0.0,
    ema=0.99,
    crop=0,
    flip=False,
    test_flips=True,
    image_size=24,
    early_scales=((2 / 3, 0.75),),
    normalization="fixed",
)
"""With differential privacy, as De et al. 2022 (https://arxiv.org/abs/2204.13650) train: no momentum, no
decay, GroupNorm, averaged parameters; scaled down to minutes by a shallow network and small images. The norm
comes after the ReLU, as Klause et al. 2022 found. Images are made 24 pixels wide: with noise in every step,
what larger ones show is learnt too late. Twice the batch for as many steps is worth more than its time: a
third less noise in each step; 56 epochs take two cores of a Zen 5
half an hour."""

PRIVATE_DIGITS = replace(
    PRIVATE,
    model="resnet20",
    activation_order="auto",
    epochs=30,
    batch_size=256,
    learning_rate=1.0,
    schedule="constant",
    crop=1,
    test_flips=False,
    image_size=0,
    early_scales=(),
)
"""The same for digits."""


def recipe(name: str, dataset: str) -> Recipe:
    """The named recipe as it is for a data set: "fast", "article" or "private".

    >>> recipe("fast", "mnist").flip
    False
    """
    if name == "article":
        return ARTICLE
    if name == "private":
        small = dataset == "digits"
        return PRIVATE_DIGITS if small else replace(PRIVATE, test_flips=dataset != "mnist")
    if dataset == "digits":
        return DIGITS
    return replace(FAST, flip=False, test_flips=False) if dataset == "mnist" else FAST


def fit_batch(chosen: Recipe, images: int, named: Recipe | None = None) -> Recipe:
    """The recipe with its batch halved until an epoch of so many images has eight steps, or it is 8.

    Where `named` has another batch, that of `chosen` is somebody's wish, and stays.

    >>> [fit_batch(Recipe(batch_size=512), images).batch_size for images in (50_000, 200)]
    [512, 16]
    """
    size = chosen.batch_size
    if named is not None and size != named.batch_size:
        return chosen
    while size > max(1, images) or (size > SMALL_BATCH and STEPS_OF_SMALL * size > images):
        size //= 2
    return replace(chosen, batch_size=size)

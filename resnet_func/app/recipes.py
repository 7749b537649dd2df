"""Recipes: how a network is trained, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from resnet_func.app.data.augment import Augment
from resnet_func.losses import cross_entropy, smoothed_cross_entropy
from resnet_func.types import LossFn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

RecipeName = Literal["fast", "article"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network and how to train it.

    Attributes:
        model: A network of the zoo.
        norm: The normalisation layers of the network.
        stem: The first layers: "cifar" keeps the resolution, "imagenet" divides it by four.
        epochs: Passes over the training set.
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
        microbatches: Pieces each batch is cut into to bound memory.
        crop: Pixels of padding before a random crop.
        flip: Mirror half of the training images.
        cutout: Side of the square blanked in each training image.
        image_size: Resize all images to this side; 0 keeps the data set's own.
        early_scales: Pairs (scale, share): for this share of the epochs, train on images scaled down by
            `scale`, and test at that size; one pair after the other, then at full size, as at least the
            last epoch always is.
        normalization: Mean and standard deviation: of the training images ("data") or ImageNet's.
    """

    model: str = "resnet20"
    norm: Literal["batch", "group", "none"] = "batch"
    stem: Literal["cifar", "imagenet"] = "cifar"
    epochs: int = 10
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
    crop: int = 4
    flip: bool = True
    cutout: int = 0
    image_size: int = 0
    early_scales: tuple[tuple[float, float], ...] = ()
    normalization: Literal["data", "imagenet"] = "data"

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "microbatches")
        natural = ("crop", "cutout", "image_size", "clip_norm", "weight_decay")
        for names, least in ((positive, 1), (natural, 0)):
            for name in names:
                if not getattr(self, name) >= least:
                    raise ValueError(f"{name} must be {least} or more; got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, in [0, 1); got {self.warmup}")
        if any(not (0 < scale <= 1 and 0 <= share <= 1) for scale, share in self.early_scales):
            raise ValueError(
                "early_scales are pairs (scale in (0, 1], share of the epochs in [0, 1]); "
                f"got {self.early_scales}. Try 0.5 0.6 0.75 0.2"
            )

    def scale_at(self, epoch: int) -> float:
        """By how much the training images of an epoch (from 0) are scaled."""
        end = 0.0
        for scale, share in self.early_scales:
            end += share
            if epoch < min(round(end * self.epochs), self.epochs - 1):
                return scale
        return 1.0


FAST = Recipe(
    epochs=12,
    optimizer="muon",
    learning_rate=0.15,
    weight_decay=0.05,
    warmup=0.15,
    crop=2,
    early_scales=((0.5, 0.42), (0.75, 0.33)),
)
"""The most accuracy for minutes on two cores, for small colour images."""

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
    flip=True,
    image_size=224,
    normalization="imagenet",
)
"""The textbook way: ResNet-18 made for ImageNet, on images resized to 224 pixels, with Adam."""


def recipe(name: str, dataset: str) -> Recipe:
    """The named recipe as it is for a data set."""
    if name == "article":
        return ARTICLE
    if dataset == "digits":
        return DIGITS
    return replace(FAST, flip=False) if dataset == "mnist" else FAST


def make_augment(recipe: Recipe) -> Augment:
    """What the recipe does to training images."""
    return Augment(crop=recipe.crop, flip=recipe.flip, cutout=recipe.cutout)


def make_loss(recipe: Recipe) -> LossFn:
    """The recipe's training loss."""
    return smoothed_cross_entropy(recipe.label_smoothing) if recipe.label_smoothing else cross_entropy

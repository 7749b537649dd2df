"""What the linear datamodelling score needs: a data set, networks trained on halves of it, and on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

import resnet_func as rf
from resnet_func import attribution, losses, optim, train
from resnet_func.app import data, training_set
from resnet_func.app.data import augment
from resnet_func.app.storage import checkpoint
from resnet_func.attribution.quantities import Checkpoint, log_odds
from resnet_func.attribution.store import Store
from resnet_func.types import Model

EVALUATED = 250  # images at a time


class Recipe(NamedTuple):
    """How every network is trained: SGD, whose rate goes up and down in a triangle, without augmentation.

    At a constant rate the last steps' noise moves a network to one class or the other, all test images alike:
    that was half of the variance between networks on halves, and hid what the halves do.
    """

    epochs: int
    batch: int
    learning_rate: float
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4


class Images(NamedTuple):
    """Normalised images and their labels, and a fingerprint of both."""

    x: Float[Tensor, "n c h w"]
    y: Int64[Tensor, "n"]
    key: str

    def batches(self, size: int = EVALUATED) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(size), self.y.split(size), strict=True))


def load(
    name: str, data_dir: str, classes: tuple[str, ...], most: tuple[int, int], size: int = 0
) -> tuple[Images, Images]:
    """Train and test images of some classes (none: all), at most so many, as many of each class.

    Args:
        name, data_dir: As in `resnet-func train`.
        classes: By name.
        most: Of the training and of the test split.
        size: Their side in pixels; 0 is the data set's own.

    Raises:
        ValueError: the data cannot be loaded, or there is no such class.
    """
    try:
        splits = data.load(name, data_dir or None)
    except data.DataError as error:
        raise ValueError(str(error)) from error
    wrong = set(classes) - set(splits.train.classes)
    if wrong:
        raise ValueError(f"{name} has no class {min(wrong)!r}; it has {', '.join(splits.train.classes)}")
    kept = [splits.train.classes.index(c) for c in classes or splits.train.classes]
    mean, std = data.channel_statistics(splits.train)
    train_set, test = (
        _some(source, kept, count, mean, std) for source, count in zip(splits, most, strict=True)
    )
    if not size:
        return train_set, test
    return tuple(images._replace(x=augment.resize(images.x, size)) for images in (train_set, test))  # type: ignore[return-value]


def _some(source: data.Source, kept: list[int], most: int, mean: Tensor, std: Tensor) -> Images:
    each = -(-most // len(kept))
    places = torch.cat([(source.labels == label).nonzero().flatten()[:each] for label in kept])[:most]
    chosen = training_set.select(source, places.sort().values)
    images = torch.cat([images for images, _ in data.batches(chosen, 1024)])
    labels = torch.stack([torch.tensor(kept.index(int(label))) for label in chosen.labels])
    return Images(data.normalize(images, mean, std), labels, training_set.fingerprint(chosen))


def subset(index: int, n: int) -> Bool[Tensor, "n"]:
    """A random half of n images; the same for the same index."""
    draw = torch.Generator("cpu").manual_seed(index)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=draw)[: n // 2]] = True
    return mask


def trained(model: Model, recipe: Recipe, x: Tensor, y: Tensor, seed: int) -> Checkpoint:
    """A network's parameters and state after training, from a seed."""
    steps = max(1, len(y) // recipe.batch) * recipe.epochs
    rate = optim.one_cycle(recipe.learning_rate, steps, recipe.warmup)
    optimizer = optim.sgd(rate, recipe.momentum, weight_decay=recipe.weight_decay)
    step = train.make_train_step(model, losses.cross_entropy, optimizer)
    start = train.init_train_state(*model.init(torch.Generator("cpu").manual_seed(seed)), optimizer)
    shuffle = torch.Generator("cpu").manual_seed(2**20 + seed)
    how: dict[str, Any] = {"epochs": recipe.epochs, "batch_size": recipe.batch, "generator": shuffle}
    found, _ = train.fit(step, start, x, y, **how)
    return found.params, found.state


def outcomes(model: Model, checkpoint: Checkpoint, images: Images) -> Float[Tensor, "t"]:
    """The log-odds of every image's label."""
    with torch.no_grad():
        parts = [log_odds(model.apply(*checkpoint, x, train=False)[0], y) for x, y in images.batches()]
    return torch.cat(parts)


def fill(store: Store, model: Model, recipe: Recipe, train_set: Images, test: Images, **share: Any) -> None:
    """Train the networks on halves that are not done yet, one row of outcomes each."""

    def compute(start: int, stop: int) -> Tensor:
        rows = []
        for index in range(start, stop):
            mask = subset(index, len(train_set.y))
            network = trained(model, recipe, train_set.x[mask], train_set.y[mask], index)
            rows.append(outcomes(model, network, test))
        return torch.stack(rows)

    store.fill(compute, **share)


def full_network(
    folder: Path, index: int, model: Model, recipe: Recipe, train_set: Images, key: dict[str, Any]
) -> Checkpoint:
    """A network trained on all images, from the folder where it was trained before."""
    name = f"network-{index}-{attribution.fingerprint(_as_tree(key))[:12]}"
    if not checkpoint.exists(folder, name):
        params, state = trained(model, recipe, train_set.x, train_set.y, 10_000 + index)
        checkpoint.save(folder, name, {"params": params, "state": state}, meta=key)
    flat, _, _ = checkpoint.load_flat(folder, name)
    both = rf.tree.unflatten(flat)
    return both["params"], both.get("state", {})


def _as_tree(key: dict[str, Any]) -> dict[str, Tensor]:
    return {"key": torch.tensor(list(repr(sorted(key.items())).encode()), dtype=torch.uint8)}

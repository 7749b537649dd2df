"""Experiments: there and back through JSON, and batches that can be redone from anywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.app import data, runtime
from resnet_func.app.experiment import (
    Experiment,
    Preparer,
    evaluation_batches,
    load_data,
    make_generator,
    make_network,
    make_optimizer,
    make_task,
    train_batches,
    training_flops,
)
from resnet_func.app.recipes import ARTICLE, FAST
from tests.app.image_folder import CLASSES, make_image_folder

RECIPE = replace(FAST, epochs=4, batch_size=5, early_scales=((0.5, 0.5),))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    images = make_image_folder(tmp_path_factory.mktemp("images"), train=6, test=3)
    return Experiment("folder", str(images), 3, RECIPE)


@pytest.fixture(scope="module")
def splits(experiment: Experiment) -> data.Splits:
    return load_data(experiment)


@pytest.fixture(scope="module")
def prepare(splits: data.Splits) -> Preparer:
    return Preparer(make_task(RECIPE, splits), runtime.configure(device="cpu", threads=1, compile="off"))


def collect(
    experiment: Experiment, splits: data.Splits, prepare: Preparer, epoch: int, first: int = 0
) -> list:
    return list(train_batches(experiment, splits.train, prepare, epoch, first))


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_an_epoch_can_be_entered_anywhere(
    experiment: Experiment, splits: data.Splits, prepare: Preparer
) -> None:
    whole = collect(experiment, splits, prepare, 2)
    assert len(whole) == len(CLASSES) * 6 // RECIPE.batch_size
    for first in range(len(whole) + 1):
        assert same(collect(experiment, splits, prepare, 2, first), whole[first:])


def test_epochs_and_seeds_differ(experiment: Experiment, splits: data.Splits, prepare: Preparer) -> None:
    here = collect(experiment, splits, prepare, 2)
    assert not same(here, collect(experiment, splits, prepare, 3))
    assert not same(here, collect(replace(experiment, seed=4), splits, prepare, 2))


def test_early_epochs_are_small_in_training_and_testing(
    experiment: Experiment, splits: data.Splits, prepare: Preparer
) -> None:
    for epoch, size in enumerate((4, 4, 8, 8)):
        (x, _), (u, _) = (
            collect(experiment, splits, prepare, epoch)[0],
            next(evaluation_batches(experiment.recipe, splits.test, prepare, epoch)),
        )
        assert x.shape[2:] == u.shape[2:] == (size, size)


def test_testing_sees_every_image_once_in_order(
    experiment: Experiment, splits: data.Splits, prepare: Preparer
) -> None:
    labels = torch.cat([y for _, y in evaluation_batches(experiment.recipe, splits.test, prepare, 3)])
    assert labels.tolist() == sorted([0, 1, 2] * 3)


def test_normalisation_is_of_the_data(experiment: Experiment, splits: data.Splits, prepare: Preparer) -> None:
    plain = replace(experiment, recipe=replace(RECIPE, crop=0, flip=False, batch_size=18, early_scales=()))
    x, _ = collect(plain, splits, prepare, 0)[0]
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-3, atol=0)


def test_imagenets_normalisation_needs_colour(splits: data.Splits) -> None:
    digits = load_data(Experiment("digits", None, 0, FAST))
    with pytest.raises(ValueError, match="needs 3 channels; the images have 1. Use 'data'"):
        make_task(ARTICLE, digits)
    assert make_task(ARTICLE, splits).mean == (0.485, 0.456, 0.406)


def test_the_network_fits_the_task(prepare: Preparer) -> None:
    config = make_network(RECIPE, prepare.task, prepare.runtime).config
    assert config is not None
    assert (config.num_classes, config.in_channels, config.stem) == (3, 3, "cifar")


@pytest.mark.parametrize(
    ("name", "head"), [("sgd", {"fc.weight"}), ("adamw", {"fc.weight"}), ("muon", set())]
)
def test_decay_reaches_convolutions_and_the_head_that_muon_leaves_to_sgd(
    prepare: Preparer, name: Any, head: set[str]
) -> None:
    model = make_network(replace(RECIPE, model="resnet18"), prepare.task, prepare.runtime)
    params, _ = model.init(make_generator("cpu", 0))
    changes: dict[str, Any] = {"schedule": "constant", "momentum": 0.0, "weight_decay": 0.5}
    optimizer = make_optimizer(replace(RECIPE, optimizer=name, **changes), 10)
    zeros = tree.map(torch.zeros_like, params)
    moved = set()
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, delta in tree.flatten(updates.delta).items():
        if delta.any():
            moved.add(path)
    assert moved == {path for path, leaf in tree.flatten(params).items() if leaf.ndim == 4} | head


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "step", "constant"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_every_optimizer_with_every_schedule_moves(name, schedule) -> None:
    optimizer = make_optimizer(replace(RECIPE, optimizer=name, schedule=schedule, warmup=0.0), 10)
    params = {"conv1": {"weight": torch.ones(2, 2)}}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert (updates.delta["conv1"]["weight"] < 0).all()


def test_small_epochs_count_for_less(experiment: Experiment, splits: data.Splits) -> None:
    full = replace(experiment, recipe=replace(RECIPE, early_scales=()))
    assert training_flops(experiment, splits) == pytest.approx(
        training_flops(full, splits) * (2 * 0.25 + 2) / 4
    )

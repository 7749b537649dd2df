"""Batches that can be redone from anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.app import data, inference, runtime
from resnet_func.app.batches import Preparer, evaluation_batches, make_generator, train_batches
from resnet_func.app.experiment import Experiment
from resnet_func.app.parts import make_network
from resnet_func.app.tasks import make_task
from resnet_func.app.training_set import load_data
from resnet_func.distributed import Ranks
from tests.app.conftest import RECIPE
from tests.app.image_folder import CLASSES, global_defaults, make_image_folder

SHAPES = {"square": (8, 8), "wide": (8, 13), "tall": (12, 7)}


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


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_shards_give_any_number_of_ranks_the_batches_of_one_from_anywhere_on(
    experiment: Experiment, tmp_path: Path
) -> None:
    data.write_shards(str(experiment.data_dir), tmp_path / "shards", images=4)
    packed = replace(experiment, dataset="shards", data_dir=str(tmp_path / "shards"), shuffle_window=6)
    splits = load_data(packed)
    prepare = Preparer(make_task(RECIPE, splits), runtime.configure(device="cpu", threads=1, compile="off"))
    whole = collect(packed, splits, prepare, 2)
    assert len(whole) == 3
    for first, world in ((0, 2), (1, 3)):
        parts = [
            list(train_batches(packed, splits.train, prepare, 2, first, Ranks(rank, world)))
            for rank in range(world)
        ]
        joined = [tuple(map(torch.cat, zip(*batch, strict=True))) for batch in zip(*parts, strict=True)]
        assert same(joined, whole[first:])
    assert not same(whole, collect(replace(packed, shuffle_window=7), splits, prepare, 2))
    assert not same(whole, collect(replace(packed, shuffle_window=0), splits, prepare, 2))


def test_epochs_and_seeds_differ(experiment: Experiment, splits: data.Splits, prepare: Preparer) -> None:
    here = collect(experiment, splits, prepare, 2)
    assert not same(here, collect(experiment, splits, prepare, 3))
    assert not same(here, collect(replace(experiment, seed=4), splits, prepare, 2))


def test_an_image_is_seen_from_both_sides_in_two_epochs(
    experiment: Experiment, splits: data.Splits, prepare: Preparer
) -> None:
    flips = replace(experiment, recipe=replace(RECIPE, crop=0, cutout=0, batch_size=18, early_scales=()))
    first, second = (collect(flips, splits, prepare, epoch)[0][0] for epoch in (0, 1))
    mirrored = [sum(bool((image == other).all()) for other in second.flip(3)) for image in first]
    assert mirrored == [1] * 18  # the order of an epoch is its own


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


@pytest.mark.parametrize("image_size", [0, 6])
@pytest.mark.parametrize(("height", "width"), SHAPES.values(), ids=SHAPES)
def test_a_file_gives_the_same_tensor_in_training_evaluation_and_prediction(
    tmp_path: Path, height: int, width: int, image_size: int
) -> None:
    images = make_image_folder(tmp_path, train=2, test=2, size=height, width=width)
    recipe = replace(RECIPE, image_size=image_size, crop=0, flip=False, early_scales=(), batch_size=6)
    experiment = Experiment("folder", str(images), 3, recipe)
    splits = load_data(experiment)
    here = runtime.configure(device="cpu", threads=1, compile="off")
    prepare = Preparer(make_task(recipe, splits), here)
    assert prepare.task.image_size == (image_size or min(height, width))
    # the test folder again as a training set, in a shuffled order
    trained = torch.cat([x for x, _ in train_batches(experiment, splits.test, prepare, 0, 0)])
    evaluated = torch.cat([x for x, _ in evaluation_batches(recipe, splits.test, prepare, 0)])
    network = inference.Trained(make_network(recipe, prepare.task, here), {}, {}, prepare.task, experiment)
    files = sorted((images / "test").rglob("*.png"))
    for file, tensor in zip(files, evaluated, strict=True):
        predicted = prepare(inference.read_image(file, network)[None])[0]
        assert torch.equal(predicted, tensor)
        assert any(torch.equal(tensor, x) for x in trained)


def test_what_is_not_square_is_cut_and_not_stretched(prepare: Preparer) -> None:
    image = torch.arange(3 * 8 * 14, dtype=torch.int64).remainder(251).to(torch.uint8).view(1, 3, 8, 14)
    assert torch.equal(prepare(image), prepare(image[..., 3:11]))
    assert torch.equal(prepare(image.mT), prepare(image[..., 3:11].mT))


def test_global_defaults_change_no_tensor(
    experiment: Experiment, splits: data.Splits, prepare: Preparer
) -> None:
    want, task = collect(experiment, splits, prepare, 2), prepare.task
    model = make_network(RECIPE, task, prepare.runtime)
    drawn = model.init(make_generator("cpu", 0))
    for dtype, device in ((torch.float64, None), (torch.float32, "meta")):
        with global_defaults(dtype, device):
            again = Preparer(task, prepare.runtime)
            assert same(collect(experiment, splits, again, 2), want)
            redrawn = make_network(RECIPE, task, prepare.runtime).init(make_generator("cpu", 0))
        for part, other in zip(drawn, redrawn, strict=True):
            leaves = tree.flatten(other)
            for path, leaf in tree.flatten(part).items():
                assert leaf.dtype == leaves[path].dtype, path
                assert torch.equal(leaf, leaves[path]), path

"""Batches that can be redone from anywhere, and the checks of the data behind them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_func import tree
from resnet_func.app import batches, data, inference, runtime
from resnet_func.app.batches import (
    Preparer,
    describe_changes,
    evaluation_batches,
    load_data,
    make_generator,
    make_task,
    train_batches,
)
from resnet_func.app.experiment import Experiment, Task
from resnet_func.app.parts import make_network
from resnet_func.app.recipes import ARTICLE, FAST
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


def test_statistics_do_not_depend_on_the_default_dtype(splits: data.Splits) -> None:
    want = make_task(RECIPE, splits)
    with global_defaults(torch.float64):
        assert make_task(RECIPE, splits) == want


@given(
    count=st.integers(1, 40), channels=st.sampled_from([1, 3]), size=st.integers(1, 64), mean=st.floats(0, 1)
)
def test_a_changed_data_set_is_described_and_the_same_is_not(
    count: int, channels: int, size: int, mean: float
) -> None:
    task = Task(("a", "b"), channels, (mean,) * channels, (0.5,) * channels, size, count, count, "this")
    assert describe_changes(task, task) is None
    changed = [
        task._replace(train_images=count + 1),
        task._replace(test_images=count + 1),
        task._replace(image_size=size + 1),
        task._replace(mean=(*task.mean[:-1], mean + 1e-3)),
        task._replace(std=(*task.std[:-1], 0.6)),
        task._replace(files="another"),
    ]
    lines = [describe_changes(task, other) for other in changed]
    assert None not in lines
    assert len(set(lines)) == len(lines) - 1  # mean and standard deviation in the same words


def test_a_run_of_an_earlier_version_knows_no_files() -> None:
    task = Task(("a", "b"), 1, (0.5,), (0.2,), 32, 10, 10)
    assert describe_changes(task, task._replace(files="some")) is None


def test_the_digest_of_files_is_of_names_sizes_and_classes(tmp_path: Path) -> None:
    def digest(root: Path) -> str:
        return batches.digest_files(data.load("folder", root))

    root = make_image_folder(tmp_path / "a", train=2, test=1)
    first = digest(root)
    assert digest(Path(shutil.copytree(root, tmp_path / "moved"))) == first
    path = next((root / "train").rglob("*.png"))
    with open(path, "ab") as file:
        file.write(b" ")
    longer = digest(root)
    path.rename(path.with_name("another.png"))
    assert len({first, longer, digest(root)}) == 3


def test_a_stream_measures_a_part_of_many_images() -> None:
    many = data.STREAM_STATISTICS_IMAGES + 1
    task = Task(("a", "b"), 1, (0.5,), (0.2,), 32, many, 10)
    assert describe_changes(task, task._replace(mean=(0.505,))) is None
    assert describe_changes(task, task._replace(mean=(0.52,))) is not None

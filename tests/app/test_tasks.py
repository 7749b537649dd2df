"""What is asked of a network, and the checks of the data behind a run that goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_func.app import data, tasks
from resnet_func.app.experiment import Experiment, Task
from resnet_func.app.recipes import ARTICLE, FAST
from resnet_func.app.tasks import describe_changes, go_on_with, make_task
from resnet_func.app.training_set import load_data
from tests.app.conftest import RECIPE
from tests.app.image_folder import global_defaults, make_image_folder


def test_imagenets_normalisation_needs_colour(splits: data.Splits) -> None:
    digits = load_data(Experiment("digits", None, 0, FAST))
    with pytest.raises(ValueError, match="needs 3 channels; the images have 1. Use 'data'"):
        make_task(ARTICLE, digits)
    assert make_task(ARTICLE, splits).mean == (0.485, 0.456, 0.406)


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
    found = task._replace(files="some")
    assert describe_changes(task, found) is None


def test_the_digest_of_files_is_of_names_sizes_and_classes(tmp_path: Path) -> None:
    def digest(root: Path) -> str:
        return tasks.digest_files(data.load("folder", root))

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


def test_what_an_earlier_version_did_not_record_is_taken_from_the_data(splits: data.Splits) -> None:
    found = make_task(RECIPE, splits)
    old = found._replace(train_images=0, test_images=0, files="", mean=(0.5, 0.4, 0.3))
    task, changes = go_on_with(old, found, splits.train)
    assert task == found._replace(mean=(0.5, 0.4, 0.3))
    assert changes == "the data have changed since the run began: other pixels on average"

"""Experiments as data."""

from dataclasses import replace

import pytest

from resnet_func.app.experiment import Experiment, TrainingSet
from resnet_func.app.recipes import Recipe


def test_only_a_folders_images_are_decoded_to_a_size():
    small = Recipe(image_size=16)
    assert Experiment("folder", "images", 0, small).decode_size == 16
    assert Experiment("cifar10", None, 0, small).decode_size is None
    assert Experiment("folder", "images", 0, Recipe()).decode_size is None


@pytest.mark.parametrize(
    "changes", [{"seed": -1}, {"seed": 2**63}, {"snapshots": -1}, {"shuffle_window": -1}]
)
def test_numbers_that_cannot_be_are_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} must be 0 or more"):
        replace(Experiment("digits", None, 0, Recipe()), **changes)


def test_a_seed_of_wrong_labels_is_one_that_a_generator_takes():
    with pytest.raises(ValueError, match="corrupt_seed must be 0 or more"):
        TrainingSet(corrupt_seed=-1)

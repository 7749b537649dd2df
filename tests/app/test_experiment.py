"""Experiments as data."""

from resnet_func.app.experiment import Experiment
from resnet_func.app.recipes import Recipe


def test_only_a_folders_images_are_decoded_to_a_size():
    small = Recipe(image_size=16)
    assert Experiment("folder", "images", 0, small).decode_size == 16
    assert Experiment("cifar10", None, 0, small).decode_size is None
    assert Experiment("folder", "images", 0, Recipe()).decode_size is None

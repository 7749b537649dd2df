"""A small folder of images, and an experiment on another with its data; a working folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_func.app import data, runtime
from resnet_func.app.batches import Preparer, load_data, make_task
from resnet_func.app.experiment import Experiment
from resnet_func.app.recipes import FAST
from tests.app.image_folder import make_image_folder

RECIPE = replace(FAST, epochs=4, batch_size=5, early_scales=((0.5, 0.5),))


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The working folder is empty, and torch has its number of threads again after the test."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("data"))


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

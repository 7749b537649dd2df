"""A small folder of images, and an experiment on another with its data; a working folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_func.app import data, runtime
from resnet_func.app.batches import Preparer
from resnet_func.app.experiment import Experiment, Plan
from resnet_func.app.recipes import FAST
from resnet_func.app.storage import run_folder
from resnet_func.app.tasks import make_task
from resnet_func.app.training.settle import make_plan
from resnet_func.app.training_set import load_data
from tests.app.image_folder import make_image_folder

RECIPE = replace(FAST, epochs=4, batch_size=5, early_scales=((0.5, 0.5),))


def planned(
    experiment: Experiment,
    machine: runtime.Runtime,
    splits: data.Splits | None = None,
    resumed: Path | None = None,
) -> Plan:
    """The plan of a new run, or of one that goes on in a folder."""
    recorded = None if resumed is None else run_folder.read_config(resumed)[1]
    return make_plan(experiment, splits or load_data(experiment), machine, recorded)


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

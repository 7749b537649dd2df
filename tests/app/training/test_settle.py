"""What is decided before a run: new runs follow the options and the data, those that go on what they were."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resnet_func import privacy
from resnet_func.app import data
from resnet_func.app.experiment import Experiment, Plan
from resnet_func.app.options import PrivateTraining, Train
from resnet_func.app.private import guarantee
from resnet_func.app.ranks.launch import ONE_PROCESS
from resnet_func.app.recipes import FAST, PRIVATE, Recipe
from resnet_func.app.storage import run_folder
from resnet_func.app.training.settle import settle
from resnet_func.app.training_set import load_data
from tests.app.conftest import planned
from tests.app.image_folder import make_image_folder
from tests.app.training.test_run import RECIPE, interrupted, machine, train


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=6, test=2)


def settled(images: Path, hyper: Recipe, begun: Path | None = None, **options: Any) -> Plan:
    asked = Train(dataset="folder", data_dir=images, hyper=hyper, **options)
    return settle(asked, begun, machine(), ONE_PROCESS, started=time.perf_counter())


def test_a_batch_follows_the_data_unless_it_is_a_wish(images: Path) -> None:
    followed, wished = (settled(images, replace(FAST, epochs=1, batch_size=size)) for size in (512, 6))
    assert (followed.experiment.recipe.batch_size, wished.experiment.recipe.batch_size) == (8, 6)
    said = "batch size: 8 in place of 512, for 18 training images"
    assert (said in followed.lines, any("batch size" in line for line in wished.lines)) == (True, False)
    assert followed.lines[1] == "data: folder, 18 training and 6 test images, 3x8x8, 3 classes"
    assert followed.lines[0].startswith("runtime: cpu")


def test_what_a_run_began_with_stays_but_for_the_place_of_its_data(images: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(images, tmp_path / "moved"))
    begun = planned(Experiment("folder", str(images), 3, RECIPE, snapshots=2), machine())
    run_folder.write_config(tmp_path, begun.experiment, begun.task)
    plan = settled(moved, replace(FAST, epochs=9), tmp_path, seed=4)
    assert plan.experiment == replace(begun.experiment, data_dir=str(moved))
    assert plan.task == begun.task
    assert len(plan.lines) == 2


@pytest.mark.parametrize("began", [True, False])
def test_a_run_goes_on_compiled_as_it_began(images: Path, tmp_path: Path, began: bool) -> None:
    begun = planned(Experiment("folder", str(images), 3, RECIPE), machine())
    run_folder.write_config(tmp_path, begun.experiment, begun.task, {"compile": began})
    asked = Train(dataset="folder", data_dir=images, hyper=RECIPE)
    may = replace(machine(), compile=True)
    plan = settle(asked, tmp_path, may, ONE_PROCESS, started=time.perf_counter())
    assert plan.machine.compile is began


def test_a_private_plan_has_its_noise_and_says_what_it_promises(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy, "noise_multiplier", lambda *given, **run: 2.5)
    monkeypatch.setattr(privacy, "epsilon", lambda *given, **run: 7.9)
    wish = PrivateTraining(private=True, epsilon=8.0, delta=1e-3)
    recipe = replace(PRIVATE, epochs=2, batch_size=6)
    plan = settled(images, recipe, recipe="private", privacy=wish)
    assert plan.budget is not None
    assert plan.budget.privacy == plan.experiment.privacy
    assert (plan.budget.privacy.noise_multiplier, plan.budget.steps) == (2.5, 6)
    assert plan.lines[0] == guarantee.guarantee(plan.experiment, plan.budget)
    run_folder.write_config(tmp_path, plan.experiment, plan.task)
    again = settled(images, recipe, tmp_path, recipe="private", privacy=wish)
    assert again._replace(splits=plan.splits) == plan


# --------------------------------------------------------------------------- on other data


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rename_class(root: Path, old: str, new: str) -> None:
    for split in ("train", "test"):
        (root / split / old).rename(root / split / new)


def add_class(root: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(root / split / "red", root / split / "purple")


def remove_class(root: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(root / split / "red")


REFUSED = {
    "renamed": (lambda root: rename_class(root, "red", "azure"), "it has azure and it lacks red"),
    "added": (add_class, "it has purple"),
    "removed": (remove_class, "it lacks red"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_a_run_is_not_resumed_with_other_classes(tmp_path: Path, change, says: str) -> None:
    images = make_image_folder(tmp_path / "images", train=6, test=2)
    folder = interrupted(images, tmp_path / "run")
    before = contents(folder)
    change(images)
    with pytest.raises(data.DataError, match=f"other classes.*{says}.*start a new run") as error:
        train(images, folder, resume=True)
    assert "\n" not in str(error.value)
    assert contents(folder) == before


def test_classes_in_another_order_and_other_channels_are_refused(images: Path, tmp_path: Path) -> None:
    folder = interrupted(images, tmp_path)
    before = contents(folder)
    experiment = Experiment("folder", str(images), 3, RECIPE)
    splits = load_data(experiment)
    assert isinstance(splits.train, data.Dataset)
    turned = replace(splits.train, classes=splits.train.classes[::-1])
    grey = replace(splits.train, images=splits.train.images[:, :1])
    for train_set, says in ((turned, "another order"), (grey, "1 channel.*made for 3")):
        with pytest.raises(data.DataError, match=says):
            planned(experiment, machine(), splits._replace(train=train_set), folder)
    assert contents(folder) == before

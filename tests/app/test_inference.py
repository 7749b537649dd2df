"""A trained network again: loaded, tested, and asked about images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_func.app import data, inference, run, run_folder, runtime
from resnet_func.app.experiment import Experiment, load_data
from resnet_func.app.recipes import FAST
from resnet_func.app.runtime import Runtime
from resnet_func.train import Progress
from tests.app.image_folder import make_image_folder, read_metrics


class Silent:
    def note(self, text: str) -> None: ...
    def batch(self, progress: Progress, num_samples: int) -> None: ...
    def epoch(self, record: run_folder.Record) -> None: ...


def load(folder: Path, which: str, machine: Runtime, *, flips: bool = False) -> inference.Trained:
    trained, warning = inference.load_trained(folder, which, machine, flips=flips)
    assert warning is None
    return trained


@pytest.fixture(scope="module")
def machine() -> Runtime:
    return runtime.configure(device="cpu", threads=1, precision="fp32", compile="off")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, machine: Runtime) -> tuple[Path, data.Splits]:
    """A run of three epochs with a moving average, whose first epochs are small."""
    images = make_image_folder(tmp_path_factory.mktemp("images"))
    recipe = replace(FAST, epochs=3, batch_size=6, learning_rate=0.1, ema=0.5)
    experiment, folder = Experiment("folder", str(images), 0, recipe), tmp_path_factory.mktemp("run")
    splits = load_data(experiment)
    run.train(experiment, splits, folder, machine, Silent())
    return folder, splits


def test_the_last_checkpoint_repeats_the_last_record(
    trained: tuple[Path, data.Splits], machine: Runtime
) -> None:
    folder, splits = trained
    evaluation = inference.evaluate_trained(load(folder, "last", machine), splits.test, machine)
    record = read_metrics(folder)[-1]
    assert (evaluation.loss, evaluation.accuracy) == (record["test_loss"], record["test_accuracy"])


def test_the_best_checkpoint_is_of_the_best_epoch(
    trained: tuple[Path, data.Splits], machine: Runtime
) -> None:
    folder, _ = trained
    accuracies = [record["test_accuracy"] for record in read_metrics(folder)]
    best = max(epoch + 1 for epoch, accuracy in enumerate(accuracies) if accuracy == max(accuracies))
    assert json.loads((folder / "checkpoints" / "best.json").read_text())["meta"]["epoch"] == best
    assert load(folder, "best", machine).task.classes == ("blue", "green", "red")


def test_flips_average(trained: tuple[Path, data.Splits], machine: Runtime) -> None:
    folder, splits = trained
    plain, averaged = (load(folder, "last", machine, flips=flips) for flips in (False, True))
    images = list(splits.test.images[:2]) if isinstance(splits.test, data.Dataset) else []
    mirrored = [image.flip(2) for image in images]
    want = (inference.predict(plain, images, machine) + inference.predict(plain, mirrored, machine)) / 2
    torch.testing.assert_close(inference.predict(averaged, images, machine), want)


def test_prediction_is_evaluation(trained: tuple[Path, data.Splits], machine: Runtime) -> None:
    folder, splits = trained
    network = load(folder, "last", machine)
    assert isinstance(splits.test, data.Dataset)
    want = inference.evaluate_trained(network, splits.test, machine).logits
    torch.testing.assert_close(inference.predict(network, list(splits.test.images), machine), want)


def test_images_of_any_size_and_mode(
    trained: tuple[Path, data.Splits], machine: Runtime, tmp_path: Path
) -> None:
    network = load(trained[0], "last", machine)
    rng = np.random.default_rng(0)
    for mode, shape in (("RGB", (20, 31, 3)), ("L", (9, 9)), ("RGBA", (8, 8, 4))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(tmp_path / "image.png")
        image = inference.read_image(tmp_path / "image.png", network)
        assert (image.dtype, image.shape) == (torch.uint8, (3, *shape[:2]))
        assert inference.predict(network, [image], machine).shape == (1, 3)
        grey = network._replace(task=network.task._replace(in_channels=1))
        assert inference.read_image(tmp_path / "image.png", grey).shape == (1, *shape[:2])


def test_colour_becomes_grey_as_in_pillow(
    trained: tuple[Path, data.Splits], machine: Runtime, tmp_path: Path
) -> None:
    network = load(trained[0], "last", machine)
    network = network._replace(task=network.task._replace(in_channels=1))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    picture.save(tmp_path / "image.png")
    want = torch.from_numpy(np.asarray(picture.convert("L")).astype(int))
    got = inference.read_image(tmp_path / "image.png", network)[0].int()
    assert (got - want).abs().max() <= 1  # Pillow rounds in fixed point

"""A trained network again: loaded, tested, and asked about images."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_func.app import data, inference, runtime
from resnet_func.app.experiment import Experiment
from resnet_func.app.recipes import FAST
from resnet_func.app.runtime import Runtime
from resnet_func.app.storage import run_folder
from resnet_func.app.training import run
from resnet_func.app.training_set import load_data
from resnet_func.models import winograd
from resnet_func.train import Progress
from resnet_func.types import TrainState
from tests.app.conftest import planned
from tests.app.image_folder import global_defaults, make_image_folder, read_metrics


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
    recipe = replace(
        FAST, model="resnet20", epochs=3, batch_size=6, learning_rate=0.1, ema=0.5, test_flips=False
    )
    experiment, folder = Experiment("folder", str(images), 0, recipe), tmp_path_factory.mktemp("run")
    splits = load_data(experiment)
    run.train(planned(experiment, machine, splits), folder, Silent())
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


def test_prediction_is_evaluation_to_the_bit(trained: tuple[Path, data.Splits], machine: Runtime) -> None:
    folder, splits = trained
    network = load(folder, "last", machine)
    assert isinstance(splits.test, data.Dataset)
    want = inference.evaluate_trained(network, splits.test, machine).logits
    assert torch.equal(inference.predict(network, iter(splits.test.images), machine), want)


def test_images_are_evaluated_and_predicted_a_microbatch_at_a_time(
    trained: tuple[Path, data.Splits], machine: Runtime
) -> None:
    folder, splits = trained
    network, sizes = load(folder, "last", machine), []

    def apply(params, state, x, *, train):
        sizes.append(len(x))
        return network.model.apply(params, state, x, train=train)

    spied = network._replace(
        model=network.model._replace(apply=apply),
        experiment=replace(network.experiment, recipe=replace(network.experiment.recipe, microbatches=2)),
    )
    inference.evaluate_trained(spied, splits.test, machine)
    assert sizes == [3, 3, 3]
    sizes.clear()
    images = [torch.zeros(3, 8 + i, 8, dtype=torch.uint8) for i in range(8)]
    assert inference.predict(spied, iter(images), machine).shape == (8, 3)
    assert sizes == [3, 3, 2]


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_damaged_checkpoint_falls_back_and_says_so(
    trained: tuple[Path, data.Splits], machine: Runtime, tmp_path: Path, which: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    # "best" may have been saved once only
    shutil.copy(folder / "checkpoints" / f"{which}.json", folder / "checkpoints" / f"{which}.previous.json")
    (folder / "checkpoints" / f"{which}.json").write_text("{")
    network, warning = inference.load_trained(folder, which, machine)
    assert warning is not None
    assert f"checkpoint '{which}' is damaged" in warning
    assert "\n" not in warning
    assert network.task.classes == ("blue", "green", "red")


def test_the_memory_format_asked_for_is_taken(trained: tuple[Path, data.Splits], machine: Runtime) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network = load(trained[0], "last", replace(machine, memory_format=memory_format))
        assert network.params["conv1"]["weight"].is_contiguous(memory_format=memory_format)


def test_the_algorithm_asked_for_is_taken(
    trained: tuple[Path, data.Splits], machine: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = []
    monkeypatch.setattr(winograd, "wrap", lambda model, speeds: wrapped.append(model) or model)
    for on in (False, True):
        load(trained[0], "last", replace(machine, winograd=on))
        assert len(wrapped) == on


def test_the_moving_average_is_what_gets_tested() -> None:
    params, state = torch.zeros(1), torch.ones(1)
    averaged = TrainState({"w": params}, {}, None, {"w": state}, {})
    assert inference.parameters_to_test(averaged)[0]["w"] is state
    plain = averaged._replace(ema_params=None, ema_state=None)
    assert inference.parameters_to_test(plain)[0]["w"] is params


@pytest.mark.parametrize("which", ["last", "best"])
@pytest.mark.parametrize("device", [None, "meta"])
def test_global_defaults_change_no_prediction(
    trained: tuple[Path, data.Splits], machine: Runtime, tmp_path: Path, which: str, device: str | None
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")

    def predict() -> torch.Tensor:
        network = load(trained[0], which, machine)
        grey = network._replace(task=network.task._replace(in_channels=1))
        images = [inference.read_image(tmp_path / "image.png", network)]
        images += [inference.read_image(tmp_path / "image.png", grey).expand(3, -1, -1)]
        return inference.predict(network, images, machine)

    want = predict()
    with global_defaults(torch.float64, device):
        got = predict()
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


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

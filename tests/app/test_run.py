"""Runs: stopped anywhere and gone on with, they are the run that never stopped, to the bit."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_func.app import data, run, run_folder, runtime
from resnet_func.app.experiment import Experiment, load_data
from resnet_func.app.recipes import FAST, Recipe
from resnet_func.app.run import Interrupted
from resnet_func.train import Progress
from tests.app.image_folder import CLASSES, make_image_folder

RECIPE = replace(
    FAST,
    epochs=3,
    batch_size=5,
    learning_rate=0.05,
    ema=0.9,
    cutout=2,
    early_scales=((0.5, 0.34),),
    clip_norm=1.0,
)
STEPS = len(CLASSES) * 6 // RECIPE.batch_size


class Silent:
    """A reporter that sends this process a signal after a number of batches."""

    def __init__(self, stop_after: int | None = None, number: int = signal.SIGINT) -> None:
        self.stop_after, self.number, self.batches, self.notes = stop_after, number, 0, []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def batch(self, progress: Progress, num_samples: int) -> None:
        self.batches += 1
        if self.batches == self.stop_after:
            os.kill(os.getpid(), self.number)

    def epoch(self, record: run_folder.Record) -> None:
        pass


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=6, test=2)


def machine() -> runtime.Runtime:
    return runtime.configure(device="cpu", threads=1, precision="fp32", compile="off")


def train(
    images: Path,
    folder: Path,
    reporter: Silent | None = None,
    *,
    resume: bool = False,
    recipe: Recipe = RECIPE,
) -> list[dict[str, float]]:
    experiment = Experiment("folder", str(images), 3, recipe)
    folder.mkdir(exist_ok=True)
    return run.train(
        experiment, load_data(experiment), folder, machine(), reporter or Silent(), resume=resume
    )


def weights(folder: Path) -> bytes:
    """The bytes of the newest checkpoint."""
    files = sorted(
        (folder / "checkpoints").glob("last*.safetensors"), key=lambda path: path.stat().st_mtime_ns
    )
    return files[-1].read_bytes()


def timeless(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in records
    ]


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], bytes]:
    folder = tmp_path_factory.mktemp("whole")
    return timeless(train(images, folder)), weights(folder)


@pytest.mark.parametrize("stop_after", range(1, 3 * STEPS))
def test_a_run_stopped_after_any_step_and_resumed_is_the_whole_run(
    images: Path, tmp_path: Path, whole: tuple[list[dict[str, float]], bytes], stop_after: int
) -> None:
    with pytest.raises(Interrupted):
        train(images, tmp_path, Silent(stop_after))
    records = timeless(train(images, tmp_path, resume=True))
    assert (records, weights(tmp_path)) == whole
    assert timeless(run_folder.read_metrics(tmp_path)) == whole[0]


def test_stopped_twice_and_by_sigterm(
    images: Path, tmp_path: Path, whole: tuple[list[dict[str, float]], bytes]
) -> None:
    with pytest.raises(Interrupted):
        train(images, tmp_path, Silent(2, signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(images, tmp_path, Silent(STEPS, signal.SIGTERM), resume=True)
    assert (timeless(train(images, tmp_path, resume=True)), weights(tmp_path)) == whole


def test_the_signal_handlers_are_put_back(images: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(images, tmp_path, recipe=replace(RECIPE, epochs=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_damaged_last_checkpoint_falls_back_and_says_so(
    images: Path, tmp_path: Path, whole: tuple[list[dict[str, float]], bytes]
) -> None:
    with pytest.raises(Interrupted):
        train(images, tmp_path, Silent(2 * STEPS + 1))
    newest = max(
        (tmp_path / "checkpoints").glob("last*.safetensors"), key=lambda path: path.stat().st_mtime_ns
    )
    newest.write_bytes(newest.read_bytes()[:-100])
    reporter = Silent()
    assert (timeless(train(images, tmp_path, reporter, resume=True)), weights(tmp_path)) == whole
    assert len(reporter.notes) == 1


def test_another_seed_is_another_run(
    images: Path, tmp_path: Path, whole: tuple[list[dict[str, float]], bytes]
) -> None:
    experiment = Experiment("folder", str(images), 4, RECIPE)
    records = run.train(experiment, load_data(experiment), tmp_path, machine(), Silent())
    assert timeless(records) != whole[0]


def test_a_batch_larger_than_the_data(images: Path, tmp_path: Path) -> None:
    with pytest.raises(run.TrainingError, match="batch_size 50 is more than the 18 training images"):
        train(images, tmp_path, recipe=replace(RECIPE, batch_size=50))


def test_divergence_is_named_and_the_checkpoint_before_it_kept(images: Path, tmp_path: Path) -> None:
    reporter = Silent(STEPS)
    with pytest.raises(Interrupted):
        train(images, tmp_path, reporter)
    kept = weights(tmp_path)
    splits = load_data(Experiment("folder", str(images), 3, RECIPE))
    assert isinstance(splits, data.Splits)
    wild = Experiment("folder", str(images), 3, replace(RECIPE, learning_rate=1e30, clip_norm=0.0))
    with pytest.raises(run.TrainingError, match=r"training diverged. Lower --learning-rate \(it is 1e\+30\)"):
        run.train(wild, splits, tmp_path, machine(), Silent(), resume=True)
    assert weights(tmp_path) == kept


def test_the_moving_average_is_what_gets_tested() -> None:
    params, state = torch.zeros(1), torch.ones(1)
    averaged = run.TrainState({"w": params}, {}, None, {"w": state}, {})
    assert run.tested(averaged)[0]["w"] is state
    assert run.tested(averaged._replace(ema_params={}, ema_state={}))[0]["w"] is params

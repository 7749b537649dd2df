"""Runs: stopped anywhere and gone on with, they are the run that never stopped, to the bit."""

from __future__ import annotations

import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from resnet_func import tree
from resnet_func.app import inference, parts, runtime
from resnet_func.app.errors import Interrupted
from resnet_func.app.experiment import Experiment
from resnet_func.app.recipes import FAST, Recipe
from resnet_func.app.storage import checkpoint, run_folder
from resnet_func.app.training import run
from resnet_func.app.training_set import load_data
from resnet_func.train import Progress
from tests.app.conftest import planned
from tests.app.image_folder import CLASSES, global_defaults, make_image_folder, read_metrics

RECIPE = replace(
    FAST,
    model="resnet20",
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


def machine(precision: Literal["fp32", "bf16"] = "fp32") -> runtime.Runtime:
    return runtime.configure(device="cpu", threads=1, precision=precision, compile="off")


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
    plan = planned(experiment, machine(), resumed=folder if resume else None)
    return run.train(plan, folder, reporter or Silent(), resume=resume).records


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
    assert timeless(read_metrics(tmp_path)) == whole[0]


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
    records = run.train(planned(experiment, machine()), tmp_path, Silent()).records
    assert timeless(records) != whole[0]


def test_a_batch_larger_than_the_data(images: Path, tmp_path: Path) -> None:
    with pytest.raises(run.TrainingError, match="batch_size 50 is more than the 18 training images"):
        train(images, tmp_path, recipe=replace(RECIPE, batch_size=50))


def test_divergence_is_named_and_the_checkpoint_before_it_kept(images: Path, tmp_path: Path) -> None:
    reporter = Silent(STEPS)
    with pytest.raises(Interrupted):
        train(images, tmp_path, reporter)
    kept = weights(tmp_path)
    wild = Experiment("folder", str(images), 3, replace(RECIPE, learning_rate=1e30, clip_norm=0.0))
    with pytest.raises(run.TrainingError, match=r"training diverged. Lower --learning-rate \(it is 1e\+30\)"):
        run.train(planned(wild, machine(), resumed=tmp_path), tmp_path, Silent(), resume=True)
    assert weights(tmp_path) == kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_record_the_result_and_a_later_evaluation_agree_to_the_bit(
    images: Path, tmp_path: Path, precision: Literal["fp32", "bf16"]
) -> None:
    # not one batch of all: how images are put into batches can change bits
    experiment = Experiment("folder", str(images), 3, replace(RECIPE, epochs=2, microbatches=2))
    splits, here = load_data(experiment), machine(precision)
    result = run.train(planned(experiment, here, splits), tmp_path, Silent())
    trained, _ = inference.load_trained(tmp_path, "last", here, flips=None)
    again = inference.evaluate_trained(trained, splits.test, here)
    plan = planned(experiment, here, splits, tmp_path)
    resumed = run.train(plan, tmp_path, Silent(), resume=True)
    record = read_metrics(tmp_path)[-1]
    for evaluation in (result.evaluation, again, resumed.evaluation):
        assert (evaluation.loss, evaluation.accuracy) == (record["test_loss"], record["test_accuracy"])
        assert torch.equal(evaluation.logits, result.evaluation.logits)
    other = machine("bf16" if precision == "fp32" else "fp32")
    trained, _ = inference.load_trained(tmp_path, "last", other, flips=None)
    elsewhere = inference.evaluate_trained(trained, splits.test, other)
    assert not torch.equal(elsewhere.logits, again.logits), "the precision asked for is the one computed in"


def test_a_recipe_is_tested_on_mirror_images_where_it_says_so(images: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1)
    tested = []
    for flips in (False, True):
        folder = tmp_path / str(flips)
        records = train(images, folder, recipe=replace(recipe, test_flips=flips))
        assert recipe.test_flips, "the fast recipe's way"
        asked = [inference.load_trained(folder, "last", machine(), flips=way)[0] for way in (None, flips)]
        splits = load_data(asked[0].experiment)
        losses = [inference.evaluate_trained(each, splits.test, machine()).loss for each in asked]
        assert losses == [records[-1]["test_loss"]] * 2
        tested.append(losses[0])
    assert tested[0] != tested[1], "the same network, tested in two ways"


def test_what_was_trained_is_returned(images: Path, tmp_path: Path) -> None:
    experiment = Experiment("folder", str(images), 3, replace(RECIPE, epochs=1))
    result = run.train(planned(experiment, machine()), tmp_path, Silent())
    saved, _ = inference.load_trained(tmp_path, "last", machine())
    assert (result.trained.task, result.trained.experiment) == (saved.task, saved.experiment)
    for mine, stored in ((result.trained.params, saved.params), (result.trained.state, saved.state)):
        want = tree.flatten(stored)
        for path, leaf in tree.flatten(mine).items():
            assert torch.equal(leaf, want[path]), path
            assert leaf.stride() == want[path].stride(), path


def test_outside_the_main_thread_signals_are_left_alone(images: Path, tmp_path: Path) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(train, images, tmp_path, recipe=replace(RECIPE, epochs=1))
        assert len(future.result()) == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_handler_that_python_did_not_set(images: Path, tmp_path: Path, monkeypatch) -> None:
    real_signal = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: real_signal(number, handler) and None)
    try:
        train(images, tmp_path, recipe=replace(RECIPE, epochs=1))
    finally:
        monkeypatch.undo()
        real_signal(signal.SIGINT, signal.default_int_handler)


# --------------------------------------------------------------------------- resumed on other data


def interrupted(images: Path, folder: Path) -> Path:
    """A run stopped in its second epoch."""
    with pytest.raises(Interrupted):
        train(images, folder, Silent(STEPS + 1))
    return folder


def half_the_files(root: Path) -> None:
    for path in sorted((root / "train").rglob("*.png"))[::2]:
        path.unlink()


def other_pixels(root: Path) -> None:
    path = root / "train" / "red" / "000.png"
    path.write_bytes((root / "train" / "blue" / "000.png").read_bytes())


def another_size(root: Path) -> None:
    shutil.rmtree(root)
    make_image_folder(root, train=6, test=2, size=12)


def swapped_classes(root: Path) -> None:
    """Two class folders trade their names; their files have the same names and sizes."""
    for split in ("train", "test"):
        red, blue = sorted((root / split).iterdir())[:2]
        for folder in (red, blue):
            folder.rename(folder.with_name(f"{folder.name}-away"))
        red.with_name(f"{red.name}-away").rename(blue)
        blue.with_name(f"{blue.name}-away").rename(red)


CHANGED = {
    "swapped": (swapped_classes, "began: other files in the classes;"),
    "half": (half_the_files, "9 training images instead of 18, other pixels on average"),
    "pixels": (other_pixels, "began: other pixels on average;"),
    "size": (another_size, "12 pixels a side instead of 8"),
}


@pytest.mark.parametrize(("change", "says"), CHANGED.values(), ids=CHANGED)
def test_changed_data_are_said_in_a_line_and_what_was_recorded_is_used(
    tmp_path: Path, monkeypatch, change, says: str
) -> None:
    images = make_image_folder(tmp_path / "images", train=6, test=2)
    folder = interrupted(images, tmp_path / "run")
    config = (folder / "config.json").read_bytes()
    _, recorded = run_folder.read_config(folder)
    change(images)
    total_steps, make = [], parts.make_optimizer
    monkeypatch.setattr(
        parts, "make_optimizer", lambda r, steps, *more: total_steps.append(steps) or make(r, steps, *more)
    )
    plan = planned(Experiment("folder", str(images), 3, RECIPE), machine(), resumed=folder)
    result = run.train(plan, folder, Silent(), resume=True)
    (note,) = plan.lines
    assert note.startswith("the data have changed since the run began")
    assert says in note
    assert "\n" not in note
    assert result.trained.task == recorded
    assert total_steps == [RECIPE.epochs * STEPS]
    assert (folder / "config.json").read_bytes() == config
    assert len(result.records) == RECIPE.epochs


def test_unchanged_data_are_not_spoken_of(images: Path, tmp_path: Path) -> None:
    folder, reporter = interrupted(images, tmp_path), Silent()
    train(images, folder, reporter, resume=True)
    assert reporter.notes == []
    assert planned(Experiment("folder", str(images), 3, RECIPE), machine(), resumed=folder).lines == ()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text('{"epoch": 1}\n{"ep')])
def test_metrics_that_are_lost_come_back_from_the_checkpoint(
    images: Path, tmp_path: Path, whole: tuple[list[dict[str, float]], bytes], damage
) -> None:
    folder, reporter = interrupted(images, tmp_path), Silent()
    damage(folder / "metrics.jsonl")
    assert timeless(train(images, folder, reporter, resume=True)) == whole[0]
    assert timeless(read_metrics(folder)) == whole[0]
    assert reporter.notes == ["metrics.jsonl was not what the checkpoint holds, and is written again from it"]


def test_a_checkpoint_of_another_version(images: Path, tmp_path: Path) -> None:
    folder = interrupted(images, tmp_path)
    like, meta, _ = checkpoint.load_flat(folder / "checkpoints", "last")
    checkpoint.save(folder / "checkpoints", "last", tree.unflatten(like), meta={"progress": meta["progress"]})
    with pytest.raises((run_folder.RunError, checkpoint.CheckpointError)) as error:
        train(images, folder, resume=True)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------- global defaults


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, None), (torch.float32, "meta")])
@pytest.mark.parametrize("optimizer", ["muon", "adam", "sgd"])
def test_another_default_dtype_changes_no_bit_of_a_run(
    images: Path,
    tmp_path: Path,
    optimizer: Literal["muon", "adam", "sgd"],
    dtype: torch.dtype,
    device: str | None,
) -> None:
    recipe = replace(RECIPE, epochs=1, optimizer=optimizer)
    want = train(images, tmp_path / "plain", recipe=recipe)
    with global_defaults(dtype, device):
        got = train(images, tmp_path / "other", recipe=recipe)
    assert weights(tmp_path / "other") == weights(tmp_path / "plain")
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert [record[name] for record in got] == [record[name] for record in want]

"""Private runs: stopped anywhere and gone on with, they draw the same noise, and no seed stays."""

from __future__ import annotations

import json
import multiprocessing
import signal
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_func import optim, privacy
from resnet_func.app.batches import Preparer
from resnet_func.app.errors import Interrupted
from resnet_func.app.experiment import Experiment, Privacy
from resnet_func.app.private import seeds, trainer
from resnet_func.app.private.guarantee import PrivateError
from resnet_func.app.recipes import Recipe
from resnet_func.app.storage.run_folder import RunError
from resnet_func.app.training import run
from resnet_func.app.training_set import load_data
from resnet_func.train import Progress
from resnet_func.types import TrainState
from tests.app.conftest import planned
from tests.app.image_folder import CLASSES, make_image_folder, read_metrics
from tests.app.training.test_run import Silent, machine, timeless, weights

pytest.importorskip("dp_accounting")
RECIPE = Recipe(
    model="tests.app.tiny:network",
    norm="group",
    epochs=2,
    batch_size=6,
    learning_rate=0.1,
    momentum=0.0,
    weight_decay=0.0,
    schedule="constant",
    ema=0.9,
    crop=1,
    normalization="fixed",
)
PRIVACY = Privacy(epsilon=50.0, delta=1e-3, noise_multiplier=4.0, views=2, clipping="adaptive")
STEPS = 2 * (len(CLASSES) * 6 // RECIPE.batch_size)
SECRET = "secret-seeds.json"


class Killed(BaseException):
    """Nothing may catch it, as nothing can catch SIGKILL."""


class Killer(Silent):
    """Ends the run in the middle, without a chance to save."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def batch(self, progress: Progress, num_samples: int) -> None:
        super().batch(progress, num_samples)
        if self.batches == self.after:
            raise Killed


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=6, test=2)


def train(
    images: Path,
    folder: Path,
    reporter: Silent | None = None,
    *,
    resume: bool = False,
    chosen: Privacy = PRIVACY,
    recipe: Recipe = RECIPE,
    insecure: int | None = 5,
    seed: int = 3,
) -> list[dict[str, float]]:
    experiment = Experiment("folder", str(images), seed, recipe, privacy=chosen)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    plan, here = planned(experiment, machine(), resumed=folder if resume else None), reporter or Silent()
    return run.train(plan, folder, here, resume=resume, insecure_seed=insecure).records


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], bytes]:
    folder = tmp_path_factory.mktemp("whole")
    return timeless(train(images, folder)), weights(folder)


@pytest.mark.parametrize("stop_after", [1, STEPS - 2])
def test_a_run_stopped_and_resumed_is_the_whole_run(
    images: Path, tmp_path: Path, whole: Any, stop_after: int
) -> None:
    with pytest.raises(Interrupted):
        train(images, tmp_path, Silent(stop_after))
    assert (timeless(train(images, tmp_path, resume=True)), weights(tmp_path)) == whole


@pytest.mark.parametrize("after", [STEPS // 2 + 1])
def test_a_step_repeated_after_a_kill_is_the_same_release(
    images: Path, tmp_path: Path, whole: Any, after: int
) -> None:
    with pytest.raises(Killed):
        train(images, tmp_path, Killer(after))
    assert (timeless(train(images, tmp_path, resume=True)), weights(tmp_path)) == whole


def train_and_die(images: Path, folder: Path, after: int, *, resume: bool) -> None:
    """Train in a process of its own until SIGKILL, which nothing can catch, comes after so many batches."""
    reporter = Silent(after, signal.SIGKILL)
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=train, args=(images, folder, reporter), kwargs={"resume": resume})
    process.start()
    try:
        process.join(timeout=240)
        assert process.exitcode == -signal.SIGKILL
    finally:
        process.kill()  # where it did not end by itself


@pytest.mark.nightly
@pytest.mark.parametrize("kills", [[1], [STEPS // 2 + 1], [STEPS], [2, STEPS // 2, STEPS // 2]], ids=str)
def test_a_run_killed_by_the_system_spends_once(
    images: Path, tmp_path: Path, whole: Any, kills: list[int]
) -> None:
    """In its first step, between checkpoints, in its last, and again and again: the same bytes."""
    for number, after in enumerate(kills):
        train_and_die(images, tmp_path, after, resume=number > 0)
        assert (tmp_path / "checkpoints" / SECRET).exists()
    records = train(images, tmp_path, resume=True)
    assert (timeless(records), weights(tmp_path)) == whole
    spent = privacy.epsilon(4.0, 1e-3, sampling_rate=RECIPE.batch_size / 18, steps=STEPS)
    assert records[-1]["epsilon"] == spent
    assert not (tmp_path / "checkpoints" / SECRET).exists()


def test_the_seeds_are_the_owners_alone_and_go_with_the_run(images: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(images, tmp_path, Silent(1), insecure=None)
    file = tmp_path / "checkpoints" / SECRET
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    values = json.loads(file.read_text()).values()
    assert all(len(value) == 32 for value in values)
    train(images, tmp_path, resume=True)
    assert not file.exists()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for value in values:
                assert value.encode() not in content
                assert str(int(value, 16)).encode() not in content
                assert int(value, 16).to_bytes(16, "big") not in content
                assert int(value, 16).to_bytes(16, "little") not in content


def test_the_seed_of_the_run_does_not_determine_the_noise(images: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(images, tmp_path / name, insecure=None)
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


def test_a_finished_run_resumed_spends_nothing_more(images: Path, tmp_path: Path, whole: Any) -> None:
    train(images, tmp_path)
    assert (timeless(train(images, tmp_path, resume=True)), weights(tmp_path)) == whole
    assert not (tmp_path / "checkpoints" / SECRET).exists()


def test_without_its_seeds_a_run_does_not_go_on(images: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(images, tmp_path, Silent(1))
    (tmp_path / "checkpoints" / SECRET).unlink()
    with pytest.raises(RunError, match="spend its budget twice"):
        train(images, tmp_path, resume=True)


def test_more_epochs_than_were_paid_for_are_refused(images: Path, tmp_path: Path) -> None:
    chosen = Privacy(epsilon=8.0, delta=1e-3, noise_multiplier=1.0)
    with pytest.raises(Interrupted):
        train(images, tmp_path, Silent(1), chosen=chosen)
    longer = replace(RECIPE, epochs=400)
    with pytest.raises(RunError, match="says epsilon 8, but its 1200 steps spend"):
        train(images, tmp_path, resume=True, chosen=chosen, recipe=longer)


def test_other_images_are_another_guarantee(images: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(images, tmp_path / "run", Silent(1))
    fewer = make_image_folder(tmp_path / "fewer", train=5, test=2)
    with pytest.raises(PrivateError, match="the guarantee is for those it began with"):
        train(fewer, tmp_path / "run", resume=True)


def test_the_files_tell_epsilon_and_nothing_of_the_images(images: Path, tmp_path: Path) -> None:
    records = train(images, tmp_path)
    assert read_metrics(tmp_path) == records
    told = {"epoch", "epsilon", "test_loss", "test_accuracy", "seconds", "images_per_second"}
    assert all(set(record) == told for record in records)
    spent = [
        privacy.epsilon(4.0, 1e-3, sampling_rate=RECIPE.batch_size / 18, steps=steps)
        for steps in (STEPS // 2, STEPS)
    ]
    assert [record["epsilon"] for record in records] == spent
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["experiment"]["privacy"]["noise_multiplier"] == 4.0


def test_diagnostics_are_marked(images: Path, tmp_path: Path) -> None:
    chosen = replace(PRIVACY, diagnostics=True)
    (first, _) = train(images, tmp_path, chosen=chosen)
    assert {"not_private/share_clipped", "not_private/signal_to_noise", "max_norm"} <= set(first)


# --------------------------------------------------------------------------- batches and steps


def drawn(images: Path, epoch: int, first: int, **changes: Any) -> list[trainer.PrivateBatch]:
    chosen = replace(PRIVACY, **changes)
    experiment = Experiment("folder", str(images), 3, RECIPE, privacy=chosen)
    plan = planned(experiment, machine())
    private = trainer.PrivateTrainer(plan, seeds.draw(insecure=1))
    prepare = Preparer(plan.task, plan.machine)
    return [batch for batch, _ in private.batches(plan.splits.train, prepare, epoch, first)]


@pytest.mark.parametrize("sampling", ["poisson", "fixed-size"])
def test_batches_are_the_samplers(images: Path, sampling: Any) -> None:
    batches = [batch for epoch in (0, 1) for batch in drawn(images, epoch, 0, sampling=sampling)]
    assert [batch.step for batch in batches] == list(range(STEPS))
    assert all(len(batch) == RECIPE.batch_size for batch in batches)
    rule: dict[str, Any] = {"steps": STEPS, "seed": seeds.draw(insecure=1).sampling}
    if sampling == "poisson":
        wanted = privacy.poisson_batches(18, sampling_rate=RECIPE.batch_size / 18, **rule)
    else:
        wanted = privacy.fixed_size_batches(18, batch_size=RECIPE.batch_size, **rule)
    source = load_data(Experiment("folder", str(images), 3, RECIPE)).train
    for batch, (indices, mask) in zip(batches, wanted, strict=True):
        labels = torch.cat([part.y[part.mask] for part in batch.parts])
        ((_, expected),) = source.read([indices[mask]]) if mask.any() else ((None, labels[:0]),)
        assert torch.equal(labels, expected)
        assert len({part.x.shape for part in batch.parts}) == 1
        assert batch.parts[0].x.shape[1] == 2  # views


def test_batches_begun_later_are_the_same(images: Path) -> None:
    whole, rest = drawn(images, 1, 0), drawn(images, 1, 2)
    for a, b in zip(whole[2:], rest, strict=True):
        assert a.step == b.step
        for one, other in zip(a.parts, b.parts, strict=True):
            assert all(map(torch.equal, one, other))


def test_batch_norm_is_refused_by_what_it_keeps() -> None:
    state, params = {"bn": {"running_mean": torch.zeros(2)}}, {"w": torch.zeros(2)}
    with pytest.raises(PrivateError, match="BatchNorm, which couples the images"):
        trainer.begin(PRIVACY, params, state, optim.sgd(0.1), ema=False)
    assert isinstance(trainer.begin(None, params, state, optim.sgd(0.1), ema=False), TrainState)

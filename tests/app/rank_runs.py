"""Runs that several ranks train together, and one rank of the test of them (as a module)."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resnet_func import per_sample, tree
from resnet_func.app import runtime
from resnet_func.app.errors import Interrupted, Unspoken
from resnet_func.app.experiment import Experiment, Privacy
from resnet_func.app.private import trainer
from resnet_func.app.ranks import launch
from resnet_func.app.recipes import Recipe
from resnet_func.app.storage import run_folder
from resnet_func.app.training import run
from resnet_func.app.training_set import load_data
from resnet_func.train import Progress
from tests.app.conftest import planned

RECIPE = Recipe(
    model="tests.distributed.exact:network",
    epochs=3,
    batch_size=7,
    learning_rate=0.05,
    ema=0.9,
    crop=1,
    cutout=2,
)


class Recorder:
    """A reporter that may do something after a number of batches."""

    def __init__(self, signal_after: int = 0) -> None:
        self.signal_after, self.batches, self.notes = signal_after, 0, []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def batch(self, progress: Progress, num_samples: int) -> None:
        self.batches += 1
        if self.batches == self.signal_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def epoch(self, record: run_folder.Record) -> None:
        pass


def train(
    images: Path,
    folder: Path,
    group: launch.Group,
    *,
    reporter: Recorder | None = None,
    resume: bool = False,
    recipe: Recipe = RECIPE,
) -> list[dict[str, float]]:
    """The records of a run of a small network whose sums are exact."""
    machine = runtime.configure(device="cpu", threads=1, precision="fp32", winograd="off", compile="off")
    experiment = Experiment("folder", str(images), 3, recipe)
    folder.mkdir(exist_ok=True)
    splits = group.first_on_node(lambda: load_data(experiment))
    reporter = reporter or Recorder()
    plan = planned(experiment, machine, splits, folder if resume else None)
    return run.train(plan, folder, reporter, resume=resume, group=group).records


def train_privately(images: Path, folder: Path, group: launch.Group) -> None:
    """A private run of ResNet-20, whose sums of clipped gradients are exact from a part of a batch on."""

    def clipped_sum_on_a_grid(*args: Any, **options: Any) -> Any:
        summed = per_sample.clipped_sum(*args, **options)

        def rounded(*inputs: Any, **more: Any) -> Any:
            total, norms = summed(*inputs, **more)
            return tree.map(lambda leaf: (leaf * 2.0**12).round() / 2.0**12, total), norms

        rounded.bound, rounded.max_norm = summed.bound, summed.max_norm
        return rounded

    recipe = replace(RECIPE, model="resnet20", norm="group", batch_size=48, ema=0.0)
    wish = Privacy(epsilon=8.0, delta=1e-3, noise_multiplier=0.9, insecure=True)
    machine = runtime.configure(device="cpu", threads=1, precision="fp32", winograd="off", compile="off")
    experiment = Experiment("folder", str(images), 3, recipe, privacy=wish)
    run_folder.checkpoints(folder).mkdir(parents=True, exist_ok=True)
    splits = group.first_on_node(lambda: load_data(experiment))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "clipped_sum", clipped_sum_on_a_grid)
        plan = planned(experiment, machine, splits)
        run.train(plan, folder, Recorder(), insecure_seed=1, group=group)


def main(images: Path, runs: Path, what: str = "") -> None:
    """All of `check`; then the last rank fails, which it tells with its number, and the others are silent."""
    if what == "private":
        with launch.group(timeout=60) as group:
            train_privately(images, runs / "private", group)
        return
    with pytest.raises((launch.RankError, Unspoken)) as raised, launch.group(timeout=60) as group:  # noqa: PT012
        check(images, runs, group)
        fail_on(group.world - 1, group)
    if group.rank < group.world - 1:
        assert isinstance(raised.value, Unspoken)
    else:
        assert str(raised.value) == f"rank {group.rank}: No space left on device"


def fail_on(rank: int, group: launch.Group) -> None:
    if group.rank == rank:
        raise OSError("No space left on device")
    group.agree(True)


def check(images: Path, runs: Path, group: launch.Group) -> None:
    """A whole run, one that a signal to the last rank stops, and what the ranks must refuse."""
    last = group.world - 1
    assert group.from_first(lambda: f"by rank {group.rank}") == "by rank 0"
    assert group.agree(group.rank == last)
    assert not group.agree(False)
    train(images, runs / "whole", group)
    stop = Recorder(signal_after=4 if group.rank == last else 0)
    with pytest.raises(Interrupted):
        train(images, runs / "stopped", group, reporter=stop)
    refused = (
        (replace(RECIPE, batch_size=1), run.TrainingError, "leaves some of 2 ranks without a sample"),
        (replace(RECIPE, crop=group.rank), launch.RankError, "rank 1 has other data or options"),
    )
    for recipe, error, message in refused:
        with pytest.raises(error, match=message):
            train(images, runs / "refused", group, recipe=recipe)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])

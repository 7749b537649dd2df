"""A run: train an experiment in its folder, with checkpoints, and go on where one stopped."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from resnet_func import optim
from resnet_func.app import checkpoint, data, recipes, run_folder
from resnet_func.app.experiment import (
    Experiment,
    Preparer,
    describe,
    make_generator,
    make_network,
    make_optimizer,
    make_task,
    test_batches,
    train_batches,
)
from resnet_func.app.recipes import Recipe
from resnet_func.app.runtime import Runtime
from resnet_func.losses import cross_entropy
from resnet_func.models import winograd
from resnet_func.train import (
    EvalStep,
    Evaluation,
    Progress,
    Step,
    autocast,
    evaluate,
    init_train_state,
    make_eval_step,
    make_train_step,
    to_memory_format,
    train_epoch,
)
from resnet_func.types import Model, Params, State, TrainState


class TrainingError(Exception):
    """Training cannot go on; the message is one line with the way out."""


class Interrupted(Exception):  # noqa: N818, it is no error
    """The user stopped the run; its state is saved."""


class Reporter(Protocol):
    """Who is told how a run goes."""

    def note(self, text: str) -> None: ...
    def batch(self, progress: Progress, num_samples: int) -> None: ...
    def epoch(self, record: run_folder.Record) -> None: ...


def train(
    experiment: Experiment,
    splits: data.Splits,
    folder: Path,
    runtime: Runtime,
    reporter: Reporter,
    *,
    resume: bool = False,
) -> list[dict[str, float]]:
    """Train the experiment in its folder, from the start or from its last checkpoint.

    Returns:
        The records of metrics.jsonl.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the run is saved after the step it was in.
        TrainingError: the loss is not finite, or the training set is smaller than a batch.
        CheckpointError, DataError, RunError: as their modules say.
    """
    recipe = experiment.recipe
    task = make_task(recipe, splits)
    steps_per_epoch = splits.train.num_samples // recipe.batch_size
    if not steps_per_epoch:
        raise TrainingError(
            f"batch_size {recipe.batch_size} is more than the {splits.train.num_samples} training images; "
            f"try --batch-size {min(32, splits.train.num_samples)}"
        )
    optimizer = make_optimizer(recipe, recipe.epochs * steps_per_epoch)
    model = make_network(recipe, task)
    step, eval_step = _make_steps(model, recipe, optimizer, runtime)
    train_state = _init(model, experiment, optimizer, runtime)
    progress, records = Progress(), []
    if resume:
        train_state, progress = _restore(folder, train_state, reporter)
        records = run_folder.read_metrics(folder)[: progress.epoch]
    else:
        run_folder.write_config(folder, describe(experiment, task))
    prepare = Preparer(task, runtime)
    with _deferred_interrupt() as interrupted:
        for epoch in range(progress.epoch, recipe.epochs):
            batches = train_batches(experiment, splits.train, prepare, epoch, progress.batch)
            steps = train_epoch(step, train_state, batches, progress, time.perf_counter)
            for train_state, progress in steps:
                reporter.batch(progress, steps_per_epoch * recipe.batch_size)
                _check_finite(progress, recipe)
                if interrupted():
                    _save(folder, train_state, progress)
                    raise Interrupted
            evaluation = evaluate(
                eval_step, *tested(train_state), test_batches(experiment, splits.test, prepare, epoch)
            )
            records.append(_record(epoch, progress, evaluation))
            progress = Progress(epoch + 1)
            _finish_epoch(folder, train_state, progress, records)
            reporter.epoch(records[-1])
            if interrupted() and epoch + 1 < recipe.epochs:
                raise Interrupted
    return records


def _finish_epoch(
    folder: Path, train_state: TrainState, progress: Progress, records: list[dict[str, float]]
) -> None:
    # metrics first: a crash in between leaves a line too many, which a resumed run drops and writes again
    run_folder.write_metrics(folder, records)
    _save(folder, train_state, progress)
    if records[-1]["test_accuracy"] >= max(record["test_accuracy"] for record in records):
        meta = {"epoch": progress.epoch}
        checkpoint.save(run_folder.checkpoints(folder), "best", tested(train_state), meta=meta)


def tested(train_state: TrainState) -> tuple[Params, State]:
    """The parameters and state to evaluate: the moving averages where they are kept."""
    if not train_state.ema_params:
        return train_state.params, train_state.state
    return train_state.ema_params, train_state.ema_state


def as_computed(model: Model, runtime: Runtime) -> Model:
    """The model by the algorithm and in the precision of the runtime."""
    if runtime.winograd:
        model = winograd.wrap(model)
    return autocast(model, runtime.device.type, torch.bfloat16) if runtime.precision == "bf16" else model


def _make_steps(
    model: Model, recipe: Recipe, optimizer: optim.Optimizer, runtime: Runtime
) -> tuple[Step, EvalStep]:
    model = as_computed(model, runtime)
    step = make_train_step(
        model,
        recipes.make_loss(recipe),
        optimizer,
        microbatches=recipe.microbatches,
        ema_decay=recipe.ema or None,
    )
    compiled = torch.compile(step, fullgraph=True, dynamic=False) if runtime.compile else step
    return compiled, make_eval_step(model, cross_entropy)


def _init(model: Model, experiment: Experiment, optimizer: optim.Optimizer, runtime: Runtime) -> TrainState:
    params, state = model.init(make_generator("cpu", experiment.seed, 0), device=runtime.device)
    params = to_memory_format(params, runtime.memory_format)
    return init_train_state(params, state, optimizer, ema=experiment.recipe.ema > 0)


def _check_finite(progress: Progress, recipe: Recipe) -> None:
    if not math.isfinite(progress.loss_sum):
        raise TrainingError(
            f"the loss is {progress.loss_sum} at epoch {progress.epoch + 1}, batch {progress.batch}: "
            f"training diverged. Lower --learning-rate (it is {recipe.learning_rate}) or set --clip-norm 1"
        )


def _record(epoch: int, progress: Progress, evaluation: Evaluation) -> dict[str, float]:
    return {
        "epoch": epoch + 1,
        "train_loss": progress.loss_sum / progress.samples,
        "train_accuracy": progress.correct / progress.samples,
        "test_loss": evaluation.loss,
        "test_accuracy": evaluation.accuracy,
        "seconds": round(progress.seconds, 3),
        "images_per_second": round(progress.samples / progress.seconds, 1),
    }


def _save(folder: Path, train_state: TrainState, progress: Progress) -> None:
    meta = {"progress": progress._asdict()}
    checkpoint.save(run_folder.checkpoints(folder), "last", train_state, meta=meta)


def _restore(folder: Path, like: TrainState, reporter: Reporter) -> tuple[TrainState, Progress]:
    train_state, meta, warning = checkpoint.load(run_folder.checkpoints(folder), "last", like)
    if warning:
        reporter.note(warning)
    return train_state, Progress(**meta["progress"])


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag, so that the step it falls in is finished and saved."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

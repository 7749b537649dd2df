"""A run: train an experiment in its folder, with checkpoints, and go on where one stopped."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from resnet_func.app import checkpoint, data, run_folder, seeds, training_record
from resnet_func.app.batches import Preparer, check_classes, describe_changes, make_task, train_batches
from resnet_func.app.errors import AppError, Interrupted
from resnet_func.app.experiment import Experiment, Task
from resnet_func.app.guarantee import PrivateError, check_budget
from resnet_func.app.inference import Trained, evaluate_trained, parameters_to_test
from resnet_func.app.parts import make_parts
from resnet_func.app.private import PrivateTrainer, private_batches
from resnet_func.app.recipes import Recipe
from resnet_func.app.runtime import Runtime
from resnet_func.train import Evaluation, Progress, train_epoch
from resnet_func.types import TrainState


class TrainingError(AppError):
    """Training cannot go on; the message is one line with the way out."""


class Reporter(Protocol):
    """Who is told how a run goes."""

    def note(self, text: str) -> None: ...
    def batch(self, progress: Progress, num_samples: int) -> None: ...
    def epoch(self, record: run_folder.Record) -> None: ...


class Result(NamedTuple):
    """What a run has made: the network, its evaluation, and the records of metrics.jsonl."""

    trained: Trained
    evaluation: Evaluation
    records: list[dict[str, float]]


def train(
    experiment: Experiment,
    splits: data.Splits,
    folder: Path,
    runtime: Runtime,
    reporter: Reporter,
    *,
    resume: bool = False,
    insecure_seed: int | None = None,
) -> Result:
    """Train the experiment in its folder, from the start or from its last checkpoint.

    A private experiment keeps secret seeds beside the checkpoints until it is done; `insecure_seed` sets
    them. Outside the main thread, where Python has no signal handlers, signals are left to their usual ways.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the run is saved after the step it was in.
        TrainingError: the loss is not finite, or the training set is smaller than a batch.
        CheckpointError, DataError, RunError: as their modules say.
    """
    recipe = experiment.recipe
    epoch_samples = splits.train.num_samples // recipe.batch_size * recipe.batch_size
    if not epoch_samples:
        raise TrainingError(
            f"batch_size {recipe.batch_size} is more than the {splits.train.num_samples} training images; "
            f"try --batch-size {min(32, splits.train.num_samples)}"
        )
    task = make_task(recipe, splits)
    if resume:
        private = experiment.privacy is not None
        task = _recorded_task(folder, task, splits, reporter, private=private)
    trainer = _private_trainer(experiment, task, folder, runtime, resume=resume, insecure=insecure_seed)
    model, step, train_state = make_parts(experiment, task, runtime, trainer)
    progress, records, evaluation = Progress(), [], None
    if resume:
        train_state, progress, records = _restore(folder, train_state, reporter)
    else:
        chosen = {"speeds": runtime.speeds.as_numbers(), "compile": runtime.compile}
        run_folder.write_config(folder, experiment, task, chosen)
        if trainer is not None:  # so that whatever stops the run, it can go on with the seeds it has
            _save(folder, train_state, progress, records)

    prepare = Preparer(task, runtime)
    with _deferred_interrupt() as interrupted:
        for epoch in range(progress.epoch, recipe.epochs):
            where = (splits.train, prepare, epoch, progress.batch)
            if trainer is None:
                batches = train_batches(experiment, *where)
            else:
                batches = private_batches(experiment, trainer.seeds, *where)
            steps = train_epoch(step, train_state, batches, progress, time.perf_counter)
            for train_state, progress in steps:
                reporter.batch(progress, epoch_samples)
                if trainer is None:
                    _check_finite(progress, recipe)
                if interrupted():
                    _save(folder, train_state, progress, records)
                    raise Interrupted
            trained = Trained(model, *parameters_to_test(train_state), task, experiment)
            evaluation = evaluate_trained(trained, splits.test, runtime, epoch=epoch)
            if trainer is None:
                record = _record(progress, evaluation)
            else:
                record = trainer.record((epoch + 1) * trainer.budget.epoch_steps, evaluation, progress)
            records = [*records, {"epoch": epoch + 1, **record}]
            progress = Progress(epoch + 1)
            _keep(folder, experiment, trained, splits.train, runtime, epoch)
            _save(folder, train_state, progress, records)
            reporter.epoch(records[-1])
            if interrupted() and epoch + 1 < recipe.epochs:
                raise Interrupted
    if trainer is not None:
        seeds.forget(folder)
    trained = Trained(model, *parameters_to_test(train_state), task, experiment)
    return Result(trained, evaluation or evaluate_trained(trained, splits.test, runtime), records)


def _private_trainer(
    experiment: Experiment, task: Task, folder: Path, runtime: Runtime, *, resume: bool, insecure: int | None
) -> PrivateTrainer | None:
    if experiment.privacy is None:
        return None
    if not resume:
        drawn = seeds.draw(insecure)
        seeds.keep(folder, drawn)
        return PrivateTrainer(experiment, task, drawn, runtime)
    if _is_done(folder, experiment.recipe):  # nothing is drawn any more
        return PrivateTrainer(experiment, task, seeds.Seeds(0, 0, 0), runtime)
    trainer = PrivateTrainer(experiment, task, seeds.read(folder), runtime)
    check_budget(trainer.budget)
    return trainer


def _is_done(folder: Path, recipe: Recipe) -> bool:
    meta = checkpoint.read_meta(run_folder.checkpoints(folder), "last")
    return meta.get("progress", {}).get("epoch", 0) >= recipe.epochs


def _recorded_task(
    folder: Path, found: Task, splits: data.Splits, reporter: Reporter, *, private: bool
) -> Task:
    """The task that config.json holds, which the run goes on with; says how the data differ from it."""
    _, task = run_folder.read_config(folder)
    check_classes(task, splits.train)
    changes = describe_changes(task, found)
    if changes and private:
        raise PrivateError(f"{changes}: the guarantee is for those it began with. Start a new run")
    if changes:
        reporter.note(f"{changes}; going on with the sizes, the normalisation and the schedule recorded then")
    if not task.train_images:  # a run of an earlier version
        task = task._replace(train_images=found.train_images, test_images=found.test_images)
    if not task.files:
        task = task._replace(files=found.files)
    return task


def _check_finite(progress: Progress, recipe: Recipe) -> None:
    if not math.isfinite(progress.loss_sum):
        raise TrainingError(
            f"the loss is {progress.loss_sum} at epoch {progress.epoch + 1}, batch {progress.batch}: "
            f"training diverged. Lower --learning-rate (it is {recipe.learning_rate}) or set --clip-norm 1"
        )


def _record(progress: Progress, evaluation: Evaluation) -> dict[str, float]:
    return {
        "train_loss": progress.loss_sum / progress.samples,
        "train_accuracy": progress.correct / progress.samples,
        "test_loss": evaluation.loss,
        "test_accuracy": evaluation.accuracy,
        "seconds": round(progress.seconds, 3),
        "images_per_second": round(progress.samples / progress.seconds, 1),
    }


def _keep(
    folder: Path, experiment: Experiment, trained: Trained, source: data.Source, runtime: Runtime, epoch: int
) -> None:
    """What the experiment wants kept of an epoch: the network, and which training images are right."""
    epochs, wanted = experiment.recipe.epochs, experiment.snapshots
    if epoch + 1 in {round((i + 1) * epochs / wanted) for i in range(wanted)}:
        kept = (trained.params, trained.state)
        name, meta = f"epoch-{epoch + 1}", {"epoch": epoch + 1}
        checkpoint.save(run_folder.checkpoints(folder), name, kept, meta=meta)
    if experiment.record:
        evaluation = evaluate_trained(trained, source, runtime, epoch=epoch)
        correct = evaluation.logits.argmax(1) == evaluation.targets
        training_record.write(folder, epoch, correct)


def _save(folder: Path, train_state: TrainState, progress: Progress, records: list[dict[str, float]]) -> None:
    """Save the run; after an epoch (progress.batch is 0) first as the best, if it is."""
    checkpoints = run_folder.checkpoints(folder)
    # a record as its pairs: the checkpoint sorts the keys of an object
    meta = {"progress": progress._asdict(), "records": [list(record.items()) for record in records]}
    accuracies = [record["test_accuracy"] for record in records]
    if progress.batch == 0 and records and accuracies[-1] >= max(accuracies):
        checkpoint.save(checkpoints, "best", parameters_to_test(train_state), meta={"epoch": progress.epoch})
    checkpoint.save(checkpoints, "last", train_state, meta=meta)
    run_folder.write_metrics(folder, records)


def _restore(
    folder: Path, like: TrainState, reporter: Reporter
) -> tuple[TrainState, Progress, list[dict[str, float]]]:
    train_state, meta, warning = checkpoint.load(run_folder.checkpoints(folder), "last", like)
    if warning:
        reporter.note(warning)
    try:
        progress, records = Progress(**meta["progress"]), [dict(pairs) for pairs in meta["records"]]
    except (KeyError, TypeError, ValueError) as error:
        raise run_folder.RunError(
            f"the checkpoint in {folder} is not of this version: {error}. Start a new run"
        ) from error
    if run_folder.write_metrics(folder, records) and records and not warning:
        reporter.note("metrics.jsonl was not what the checkpoint holds, and is written again from it")
    return train_state, progress, records


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag, so that the step it falls in is finished and saved."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
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
            # None: the handler was not set by Python, which cannot put it back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

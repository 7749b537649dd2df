"""A run: train an experiment in its folder, with checkpoints, and go on where one stopped."""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from resnet_func.app import data
from resnet_func.app.batches import ONE_RANK, Preparer, train_batches
from resnet_func.app.errors import AppError, Interrupted
from resnet_func.app.experiment import Plan
from resnet_func.app.inference import Trained, evaluate_trained, parameters_to_test
from resnet_func.app.parts import make_parts
from resnet_func.app.private import seeds
from resnet_func.app.private.trainer import make_trainer
from resnet_func.app.ranks.launch import ONE_PROCESS, Group, is_lost
from resnet_func.app.recipes import Recipe
from resnet_func.app.runtime import Runtime
from resnet_func.app.storage import checkpoint, run_folder
from resnet_func.app.training import training_record
from resnet_func.distributed import Ranks, fingerprint
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
    plan: Plan,
    folder: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    group: Group = ONE_PROCESS,
    insecure_seed: int | None = None,
) -> Result:
    """Train as planned in the run's folder, from the start or from its last checkpoint.

    A private experiment keeps secret seeds beside the checkpoints until it is done; `insecure_seed` sets
    them. Outside the main thread, where Python has no signal handlers, signals are left to their usual ways.

    Args:
        plan: What to train, on what, by what machine.
        folder: The run folder, which every rank reads and rank 0 writes.
        reporter: Who is told.
        resume: Go on from the last checkpoint.
        group: The ranks that train together; all return the same.

    Raises:
        Interrupted: SIGINT or SIGTERM came, to any rank; the run is saved after the step it was in.
        TrainingError: the loss is not finite, or the training set is smaller than a batch.
        RankError: the ranks do not agree.
        CheckpointError, DataError, RunError: as their modules say.
    """
    experiment, splits, task, machine = plan[:4]
    recipe, writes = experiment.recipe, group.rank == 0
    epoch_samples = _samples_per_epoch(plan, group)
    group.check_same(_digest(plan), "has other data or options than rank 0: give all the same")
    trainer = make_trainer(plan, folder, group, resume=resume, insecure=insecure_seed)
    tested, step, train_state = make_parts(plan, trainer, group.ranks)
    progress, records, evaluation = Progress(), [], None
    if resume:
        train_state, progress, records = _restore(folder, train_state, reporter, writes=writes)
    elif writes:
        chosen = {"speeds": machine.speeds.as_numbers(), "compile": machine.compile}
        run_folder.write_config(folder, experiment, task, chosen)
        if trainer is not None:  # so that whatever stops the run, it can go on with the seeds it has
            _save(folder, train_state, progress, records)
    _check_alike(train_state, group)

    prepare, ranks = Preparer(task, machine), group.ranks or ONE_RANK
    with _deferred_interrupt(once=group.ranks is None) as received:
        for epoch in range(progress.epoch, recipe.epochs):
            where = (splits.train, prepare, epoch, progress.batch)
            batches = trainer.batches(*where) if trainer else train_batches(experiment, *where, ranks)
            clock, size = time.perf_counter, recipe.batch_size
            steps = train_epoch(step, train_state, batches, progress, clock, batch_size=size)
            try:
                for done in steps:
                    train_state, progress = done
                    reporter.batch(progress, epoch_samples)
                    if trainer is None:
                        _check_finite(progress, recipe)
                    if group.agree(received()):
                        raise Interrupted
            except RuntimeError as error:
                if writes and group.world > 1 and is_lost(error):
                    _save(folder, train_state, progress, records)  # the last step that was whole
                raise
            except Interrupted:
                if writes:
                    _save(folder, train_state, progress, records)
                raise
            trained = Trained(tested, *parameters_to_test(train_state), task, experiment)
            evaluation = evaluate_trained(trained, splits.test, machine, epoch=epoch, ranks=ranks)
            record = trainer.record(progress, evaluation) if trainer else _record(progress, evaluation)
            records = [*records, {"epoch": epoch + 1, **record}]
            progress = Progress(epoch + 1)
            _check_alike(train_state, group)
            _keep(folder, trained, splits.train, machine, epoch, ranks)
            if writes:
                _save(folder, train_state, progress, records)
            reporter.epoch(records[-1])
            if group.agree(received()) and epoch + 1 < recipe.epochs:
                raise Interrupted
    if trainer is not None and writes:
        seeds.forget(folder)
    trained = Trained(tested, *parameters_to_test(train_state), task, experiment)
    evaluation = evaluation or evaluate_trained(trained, splits.test, machine, ranks=ranks)
    return Result(trained, evaluation, records)


def _samples_per_epoch(plan: Plan, group: Group) -> int:
    """Whole batches' samples, once there is one and every rank has a part of it."""
    size, images = plan.experiment.recipe.batch_size, plan.splits.train.num_samples
    if size > images:
        raise TrainingError(
            f"batch_size {size} is more than the {images} training images; try --batch-size {min(32, images)}"
        )
    if size < group.world:
        raise TrainingError(
            f"batch_size {size} leaves some of {group.world} ranks without a sample; "
            f"raise --batch-size to {group.world} or more, or start fewer ranks"
        )
    return images // size * size


def _digest(plan: Plan) -> int:
    """A number of all that decides a run's numbers; where a rank's data lie does not."""
    alike = replace(plan.experiment, data_dir=None, init=None)
    return int.from_bytes(hashlib.sha256(repr((alike, plan.task)).encode()).digest()[:7], "big")


def _check_alike(train_state: TrainState, group: Group) -> None:
    if group.world > 1:
        group.check_same(
            fingerprint(train_state),
            "holds other parameters than rank 0: its software, its hardware or its memory differs. "
            "Go on without it from the last checkpoint, by --resume",
        )


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
    folder: Path, trained: Trained, source: data.Source, runtime: Runtime, epoch: int, ranks: Ranks
) -> None:
    """What the experiment wants kept of an epoch: the network, and which training images are right."""
    experiment, writes = trained.experiment, ranks.rank == 0
    epochs, wanted = experiment.recipe.epochs, experiment.snapshots
    if writes and epoch + 1 in {round((i + 1) * epochs / wanted) for i in range(wanted)}:
        kept = (trained.params, trained.state)
        name, meta = f"epoch-{epoch + 1}", {"epoch": epoch + 1}
        checkpoint.save(run_folder.checkpoints(folder), name, kept, meta=meta)
    if experiment.record:
        evaluation = evaluate_trained(trained, source, runtime, epoch=epoch, ranks=ranks)
        correct = evaluation.logits.argmax(1) == evaluation.targets
        if writes:
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
    folder: Path, like: TrainState, reporter: Reporter, *, writes: bool
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
    if writes and run_folder.write_metrics(folder, records) and records and not warning:
        reporter.note("metrics.jsonl was not what the checkpoint holds, and is written again from it")
    return train_state, progress, records


@contextmanager
def _deferred_interrupt(*, once: bool) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag, so that the step it falls in is finished and saved.

    With `once` the next one interrupts at once. Of several ranks none may leave the others alone: torchrun
    sends each of them a signal that the terminal may have sent already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received and once:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            # None: the handler was not set by Python, which cannot put it back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

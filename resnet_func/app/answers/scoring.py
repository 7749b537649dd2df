"""The scores of a run's training images: computed, ranked, written as scores.csv."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from resnet_func import files
from resnet_func.app import data
from resnet_func.app.batches import Preparer
from resnet_func.app.errors import AppError
from resnet_func.app.experiment import Experiment
from resnet_func.app.inference import Trained, load_trained
from resnet_func.app.ranks import dealing
from resnet_func.app.ranks.launch import ONE_PROCESS, Group
from resnet_func.app.runtime import Runtime
from resnet_func.app.storage import run_folder
from resnet_func.app.training import training_record
from resnet_func.app.training_set import Training, image_name
from resnet_func.attribution import (
    Scores,
    fingerprint,
    forgetting,
    found_share,
    ranks,
    score_dataset,
    suspicion_order,
)
from resnet_func.losses import cross_entropy
from resnet_func.types import Model, Params, State


class TrainingBatches:
    """The training images, prepared as for evaluation, in batches; an iterable to go through repeatedly."""

    def __init__(self, source: data.Source, prepare: Preparer, batch_size: int) -> None:
        self.source, self.prepare, self.batch_size = source, prepare, batch_size

    def __len__(self) -> int:
        return -(-self.source.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in data.batches(self.source, self.batch_size):
            yield self.prepare(images), labels.to(self.prepare.runtime.device)

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The images `start:stop` as one batch."""
        ((images, labels),) = self.source.read([torch.arange(start, stop, dtype=torch.int64, device="cpu")])
        return self.prepare(images), labels.to(self.prepare.runtime.device)


def exact(machine: Runtime) -> Runtime:
    """The machine for looking at gradients: plain algorithms in float32, rows in order."""
    plain = replace(machine, winograd=False, compile=False, precision="fp32")
    return replace(plain, memory_format=torch.contiguous_format)


class Kept(NamedTuple):
    """A network as an epoch left it; `model` takes images of full size, and looks at them at the epoch's."""

    model: Model
    params: Params
    state: State
    scale: float

    @property
    def leaves(self) -> tuple[Params, State]:
        return self.params, self.state


def load_checkpoints(folder: Path, machine: Runtime) -> tuple[Trained, list[Kept], list[str]]:
    """A run's network; what it kept of its epochs, or else the last; warnings.

    Raises:
        RunError, CheckpointError: as `inference.load_trained`.
    """
    names = run_folder.snapshots(folder) or ["last"]
    loaded = [load_trained(folder, name, machine) for name in names]
    kept = []
    for name, (trained, _) in zip(names, loaded, strict=True):
        recipe = trained.experiment.recipe
        epoch = recipe.epochs if name == "last" else int(name.removeprefix("epoch-"))
        scale = recipe.scale_at(epoch - 1)
        model = trained.model
        if scale != 1.0:
            model = model._replace(apply=_Scaled(model, Preparer(trained.task, machine), scale))
        kept.append(Kept(model, trained.params, trained.state, scale))
    return loaded[-1][0], kept, [warning for _, warning in loaded if warning]


class _Scaled:
    """The `apply` of a network that was trained on smaller images: it makes them smaller first."""

    def __init__(self, model: Model, prepare: Preparer, scale: float) -> None:
        self.inner, self.prepare, self.size = model.apply, prepare, scale

    def __call__(self, params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
        return self.inner(params, state, self.prepare.scale(x, self.size), train=train)


def check_same_data(experiments: Sequence[Experiment]) -> None:
    """Refuse runs whose training images differ: their scores have no mean.

    Raises:
        AppError: names the difference.
    """
    first = experiments[0]
    for other in experiments[1:]:
        # what is kept at random depends on the run's seed
        seeds = (first.seed, other.seed) if first.training_set.which == "random" else (0, 0)
        ours, theirs = (
            (e.dataset, e.data_dir, e.decode_size, e.training_set, seed)
            for e, seed in zip((first, other), seeds, strict=True)
        )
        if ours != theirs:
            raise AppError(
                "the runs were trained on other images or labels than each other; score those that differ in "
                "their seed or network only"
            )


def score_runs(
    folders: Sequence[Path],
    training: Training,
    names: Sequence[str],
    machine: Runtime,
    *,
    group: Group = ONE_PROCESS,
    **options: Any,
) -> tuple[Scores, list[str]] | None:
    """The scores of the training images, averaged over runs, each over its checkpoints; and warnings.

    Args:
        folders: Run folders.
        training: Their training images.
        names: Of scores, also "forgetting", which takes runs with a record.
        machine: Where to compute.
        group: The ranks that the images are dealt to, a batch at a time; rank 0 alone gets the scores, those
            of one process to the bit.
        **options: `batch_size`, and those of `score_dataset`.

    Raises:
        AppError: a run has no record where "forgetting" is wanted, or a rank does not do its part.
    """
    batch_size, found, warnings = options.pop("batch_size"), [], []
    own = [name for name in names if name != "forgetting"]
    for folder in folders:
        trained, checkpoints, notes = load_checkpoints(folder, machine)
        batches = TrainingBatches(training.source, Preparer(trained.task, machine), batch_size)
        if group.ranks is None:
            scores = _mean_scores(checkpoints, batches, own, **options)
        else:
            scores = _dealt_scores(folder, trained, checkpoints, batches, training, own, group)
        if scores is None:
            continue
        if "forgetting" in names:
            scores.values["forgetting"] = _forgetting(folder)
        found.append(scores)
        warnings += notes
    if not found:
        return None
    means = {name: torch.stack([scores.values[name] for scores in found]).mean(0) for name in found[0].values}
    return found[-1]._replace(values=means), warnings


def _mean_scores(
    checkpoints: list[Kept], batches: Iterable[tuple[Tensor, Tensor]], names: list[str], **options: Any
) -> Scores:
    """Scores averaged over checkpoints, each at its own image size; predictions are the last one's."""
    found = [
        score_dataset(kept.model, cross_entropy, names, train=False, **options)([kept.leaves], batches)
        for kept in checkpoints
    ]
    sums = {name: sum([scores.values[name] for scores in found[1:]], found[0].values[name]) for name in names}
    return found[-1]._replace(values={name: total / len(found) for name, total in sums.items()})


def _dealt_scores(
    folder: Path,
    trained: Trained,
    checkpoints: list[Kept],
    batches: TrainingBatches,
    training: Training,
    names: list[str],
    group: Group,
) -> Scores | None:
    """This rank's part of a run's scores, in a store; all of them on rank 0, None on the others."""
    source = training.source
    key = {
        "scores": names,
        "batch_size": batches.batch_size,
        "checkpoints": [(kept.scale, fingerprint(*kept.leaves)) for kept in checkpoints],
        "images": fingerprint({"places": training.places, "labels": source.labels}),
        "experiment": repr(replace(trained.experiment, data_dir=None)),
    }
    store = dealing.open_dealt(
        folder, "scores", key, rows=source.num_samples, width=len(names) + 2, chunk=batches.batch_size
    )
    checks = iter([None])  # one chunk's scores are compared with those of a loop: the transforms are the same

    def compute(start: int, stop: int) -> Tensor:
        found = _mean_scores(checkpoints, [batches.rows(start, stop)], names, check=next(checks, False))
        return dealing.as_rows(found)

    dealing.fill(store, compute, group)
    dealing.wait(store, group)
    return None if group.rank else dealing.from_rows(dealing.take(store), names)


def _forgetting(folder: Path) -> Tensor:
    correct = training_record.read(folder)
    if correct is None:
        raise AppError(
            f"{folder} has no record to count forgetting in. Train with: resnet-func train --record"
        )
    return forgetting(correct)


class Found(NamedTuple):
    """The share of planted labels that a score finds in the first 10 and 20 % of its order."""

    in_tenth: float
    in_fifth: float


def found_by_score(scores: Scores, planted: Bool[Tensor, "n"]) -> dict[str, Found]:
    """How well each score finds planted labels."""
    orders = {name: suspicion_order(values, name) for name, values in scores.values.items()}
    return {
        name: Found(found_share(order, planted, 0.1), found_share(order, planted, 0.2))
        for name, order in orders.items()
    }


def write_csv(path: Path, scores: Scores, training: Training, rank_by: str) -> None:
    """One line an image, the most suspicious first.

    The columns: rank, index in the data set, file, label, prediction, suggestion (the likeliest other label),
    every score, and planted, where labels were.

    Raises:
        RunError: the disk refuses; the old file, if any, is kept.
    """
    source, classes = training.source, training.source.classes
    places: Int64[Tensor, "n"] = ranks(scores.values[rank_by], rank_by)
    planted = bool(training.planted.any())
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    names = ["rank", "index", "file", "label", "prediction", "suggestion", *scores.values]
    writer.writerow([*names, "planted"] if planted else names)
    labels = source.labels.tolist()
    for place in suspicion_order(scores.values[rank_by], rank_by).tolist():
        index = int(training.places[place])
        label_indices = (labels[place], int(scores.predictions[place]), int(scores.suggestions[place]))
        row = [
            int(places[place]),
            index,
            image_name(source, place, index),
            *[classes[label] for label in label_indices],
        ]
        row += [f"{float(values[place]):.7g}" for values in scores.values.values()]
        writer.writerow([*row, int(training.planted[place])] if planted else row)
    try:
        files.write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise run_folder.RunError(
            f"cannot write {path}: {error.strerror}. The old file, if any, is kept"
        ) from error


UNTRAINED = 0.5  # share of the labels from which on a network that disagrees says nothing of them


def advice(scores: Scores, training: Training, rank_by: str, folder: Path, experiment: Experiment) -> str:
    """What to do next, in one line."""
    labels = training.source.labels.cpu()
    differ = int((scores.predictions != labels).sum())
    share = differ / max(len(labels), 1)
    out = min(max(share, 0.01), 0.99)
    where = ["--dataset", experiment.dataset]
    if experiment.data_dir is not None:
        where += ["--data-dir", experiment.data_dir]
    disagrees = f"the network disagrees with {differ:,} of {len(labels):,} labels ({share:.1%})"
    text = (
        f"{disagrees}: look at {folder}/suspects.png, correct what is wrong, or leave the {out:.0%} most "
        f"suspicious out with: resnet-func train {shlex.join(where)} --keep {1 - out:.2f} --which easy "
        f"--by {rank_by} --scores {shlex.quote(f'{folder}/scores.csv')}"
    )
    if share > UNTRAINED:
        text = (
            f"{disagrees}: it has not learnt these images, and says little about their labels. Train it "
            "longer, and score them again"
        )
    if training.planted.any():
        found = found_by_score(scores, training.planted)
        best = max(found, key=lambda name: (found[name].in_tenth, found[name].in_fifth))
        text = (
            f"of the planted labels, {best} finds {found[best].in_tenth:.1%} in the first 10 % inspected and "
            f"{found[best].in_fifth:.1%} in the first 20 %; see {folder}/found.png"
        )
    return text

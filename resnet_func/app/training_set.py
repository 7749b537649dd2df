"""The images of an experiment; those to train on as it wants them: wrong labels planted, a part kept."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from resnet_func.app import data
from resnet_func.app.batches import make_generator
from resnet_func.app.data import members
from resnet_func.app.errors import AppError
from resnet_func.app.experiment import Experiment, TrainingSet
from resnet_func.app.names import counted
from resnet_func.attribution import SUSPICIOUS, plant_wrong_labels, suspicion_order


class Training(NamedTuple):
    """The images to train on.

    Attributes:
        source: The images and the labels they are trained with.
        places: The place of each in the data set.
        planted: Which have a planted wrong label.
    """

    source: data.Source
    places: Int64[Tensor, "n"]
    planted: Bool[Tensor, "n"]


def load_data(experiment: Experiment, *, download: bool = True) -> data.Splits:
    """The run's training and test images; of the training images, what the experiment makes of them.

    >>> from resnet_func.app.recipes import Recipe
    >>> load_data(Experiment("digits", None, 0, Recipe())).test.num_samples
    364

    Raises:
        DataError: the data is missing, damaged or ill-arranged.
        AppError: the scores to choose by cannot be read, or are of other data.
    """
    training, test = load_training(experiment, download=download)
    return data.Splits(training.source, test)


def load_training(experiment: Experiment, *, download: bool = True) -> tuple[Training, data.Source]:
    """`load_data`, with what is known of the training images: their places, and which labels are planted."""
    directory = None if experiment.data_dir is None else Path(experiment.data_dir)
    splits = data.load(experiment.dataset, directory, image_size=experiment.decode_size, download=download)
    return prepare(experiment.training_set, splits.train, experiment.seed), splits.test


def describe(name: str, splits: data.Splits) -> str:
    """The data set in a line."""
    channels, height, width = splits.train.image_shape
    tested = counted(splits.test.num_samples, "test image")
    return (
        f"data: {name}, {splits.train.num_samples:,} training and {tested}, "
        f"{channels}x{height}x{width}, {counted(len(splits.train.classes), 'class', 'classes')}"
    )


def prepare(changes: TrainingSet, source: data.Source, seed: int) -> Training:
    """Plant wrong labels, then keep a part: the same for the same changes, data and seed.

    Args:
        changes: What to do.
        source: All training images of the data set.
        seed: The run's, for what is kept at random.

    Raises:
        AppError: the scores cannot be read, or are of other data.
    """
    index = torch.arange(source.num_samples, dtype=torch.int64, device="cpu")
    planted = torch.zeros(source.num_samples, dtype=torch.bool, device="cpu")
    if changes.corrupt:
        draw = torch.Generator("cpu").manual_seed(changes.corrupt_seed)
        labels = source.labels.cpu()
        labels, planted = plant_wrong_labels(labels, len(source.classes), changes.corrupt, draw)
        source = with_labels(source, labels)
    if changes.keep < 1:
        index = _kept(changes, source.num_samples, seed)
        source, planted = select(source, index), planted[index]
    return Training(source, index, planted)


def _kept(changes: TrainingSet, n: int, seed: int) -> Int64[Tensor, "k"]:
    """The places of what is kept, in the data set's order."""
    count = max(1, round(changes.keep * n))
    if changes.which == "random":
        draw = make_generator("cpu", seed, 4)
        order = torch.randperm(n, generator=draw, device="cpu", dtype=torch.int64)
    else:
        order = suspicion_order(read_scores(Path(changes.scores), changes.by, n), changes.by)
        order = order.flip(0) if changes.which == "easy" else order
    return order[:count].sort().values


def read_scores(path: Path, name: str, n: int) -> Tensor:
    """One score of all n images of a data set, from a scores.csv.

    Raises:
        AppError: the file cannot be read, has no such score, or is of other data.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise AppError(
            f"cannot read the scores in {path}: {error}. Write them with: resnet-func scores"
        ) from error
    columns = [column for column in (rows[0] if rows else {}) if column in SUSPICIOUS]
    if name not in columns:
        raise AppError(f"{path} has no score {name!r}; it has {', '.join(columns) or 'none'}. Choose by --by")
    try:
        scores = {int(row["index"]): float(row[name]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise AppError(f"{path} is damaged: {error}. Write it anew with: resnet-func scores") from error
    if sorted(scores) != list(range(n)):
        raise AppError(
            f"{path} has scores of {len(scores)} images, where the data set has {n}. Take the scores of a "
            "run on all of the same data"
        )
    return torch.tensor([scores[i] for i in range(n)], dtype=torch.float64, device="cpu")


# --------------------------------------------------------------------------- sources


def with_labels(source: data.Source, labels: Int64[Tensor, "n"]) -> data.Source:
    """The same images with other labels."""
    if isinstance(source, data.Dataset):
        return dataclasses.replace(source, labels=labels.to(source.labels.device))
    if isinstance(source, data.Stream):
        return dataclasses.replace(source, labels=labels)
    raise TypeError(f"expected a Dataset or a Stream; got {type(source).__name__}")


def select(source: data.Source, index: Int64[Tensor, "k"]) -> data.Source:
    """Some of the images, in this order."""
    files = tuple(source.files[i] for i in index.tolist()) if source.files else ()
    if isinstance(source, data.Dataset):
        at = index.to(source.images.device)
        return dataclasses.replace(source, images=source.images[at], labels=source.labels[at], files=files)
    if isinstance(source, data.Stream):
        return dataclasses.replace(source, files=files, labels=source.labels[index])
    raise TypeError(f"expected a Dataset or a Stream; got {type(source).__name__}")


def image_name(source: data.Source, place: int, index: int) -> str:
    """What a user knows an image by: its file, or its number in the data set."""
    return source.files[place] if source.files else f"{source.name} {index}"


def fingerprint(source: data.Source) -> str:
    """A SHA-256 of the images and their labels; of what is streamed, of the files' names, sizes and times."""
    digest = hashlib.sha256()
    if isinstance(source, data.Dataset):
        digest.update(f"{list(source.images.shape)}".encode())
        digest.update(source.images.cpu().contiguous().numpy().data)
    else:
        for file in source.files:
            _, size, changed = members.facts(file)
            digest.update(f"{file} {size} {changed}\n".encode())
    digest.update(source.labels.cpu().contiguous().numpy().data)
    return digest.hexdigest()

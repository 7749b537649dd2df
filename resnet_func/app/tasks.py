"""What a data set asks of a network, and whether it still does of a run that goes on."""

from __future__ import annotations

import hashlib

from resnet_func.app import data
from resnet_func.app.data import members
from resnet_func.app.experiment import Task
from resnet_func.app.recipes import IMAGENET_MEAN, IMAGENET_STD, Recipe


def make_task(recipe: Recipe, splits: data.Splits) -> Task:
    """What the data set asks of the network; reads all training images, if their statistics are wanted.

    Raises:
        ValueError: `recipe.normalization` is for other channels.
    """
    source = splits.train
    channels, height, width = source.image_shape
    if recipe.normalization == "imagenet":
        if channels != 3:
            raise ValueError(
                f"normalization='imagenet' needs 3 channels; the images have {channels}. Use 'data'"
            )
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif recipe.normalization == "fixed":
        mean, std = (0.5,) * channels, (0.25,) * channels
    else:
        mean, std = (tuple(values.float().tolist()) for values in data.channel_statistics(source))
    size = recipe.image_size or min(height, width)
    counts = source.num_samples, splits.test.num_samples
    return Task(source.classes, channels, mean, std, size, *counts, digest_files(splits))


def digest_files(splits: data.Splits) -> str:
    """A digest of every image's class, of its file's name and size where it has one, and of an image a class.

    Cheap: of the files, one a class is read. The same where a folder was moved or copied; another where two
    class folders have swapped their images.

    >>> digest_files(data.load("digits")) == digest_files(data.load("digits"))
    True
    """
    digest = hashlib.sha256()
    for source in splits:
        labels = source.labels.tolist()
        first_of_class = {label: place for place, label in reversed(list(enumerate(labels)))}
        for place, label in enumerate(labels):
            file = source.files[place] if source.files else None
            found = None if file is None else members.facts(file)
            name = "" if found is None else f"{found.name} {found.size}"
            digest.update(f"{label} {name}\n".encode(errors="surrogateescape"))
            if first_of_class[label] != place:
                continue
            if file is not None:
                digest.update(members.read(file))
            elif isinstance(source, data.Dataset):
                digest.update(source.images[place].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_classes(task: Task, source: data.Source) -> None:
    """Refuse data with other classes or channels than the network was made for.

    Raises:
        DataError: says which, in one line.
    """
    if source.image_shape[0] != task.in_channels:
        raise data.DataError(
            f"{source.name}: images of {source.image_shape[0]} channel(s), where the network was made for "
            f"{task.in_channels}. Use the data it was trained on, or start a new run"
        )
    if source.classes != task.classes:
        added, missing = (
            ", ".join(sorted(set(a) - set(b))[:5])
            for a, b in ((source.classes, task.classes), (task.classes, source.classes))
        )
        names = [f"it has {added}" if added else "", f"it lacks {missing}" if missing else ""]
        difference = " and ".join(filter(None, names)) or "they come in another order"
        raise data.DataError(
            f"{source.name} has other classes than the network was made for: {difference}. "
            "Use the data it was trained on, or start a new run"
        )


def go_on_with(recorded: Task, found: Task, source: data.Source) -> tuple[Task, str | None]:
    """The task that a run began with, for it to go on with, and a line about what differs in the data now.

    Raises:
        DataError: the classes or channels differ.
    """
    check_classes(recorded, source)
    changes = describe_changes(recorded, found)
    if not recorded.train_images:  # a run of an earlier version
        recorded = recorded._replace(train_images=found.train_images, test_images=found.test_images)
    return recorded if recorded.files else recorded._replace(files=found.files), changes


def describe_changes(recorded: Task, found: Task) -> str | None:
    """What is different about the data since the run began, as one line; None if nothing is.

    >>> task = Task(("a", "b"), 3, (0.5,) * 3, (0.2,) * 3, 32, train_images=90, test_images=10)
    >>> describe_changes(task, task._replace(train_images=45))
    'the data have changed since the run began: 45 training images instead of 90'
    """
    changes = [
        f"{now} {what} instead of {before}"
        for what, now, before in (
            ("training images", found.train_images, recorded.train_images),
            ("test images", found.test_images, recorded.test_images),
            ("pixels a side", found.image_size, recorded.image_size),
        )
        if before and now != before
    ]
    # of so many images a stream measures a part, a data set in memory all
    tolerance = 0.01 if found.train_images > data.STREAM_STATISTICS_IMAGES else 0.0
    pairs = zip(found.mean + found.std, recorded.mean + recorded.std, strict=True)
    if any(abs(now - before) > tolerance for now, before in pairs):
        changes.append("other pixels on average")
    if not changes and recorded.files and found.files != recorded.files:
        changes.append("other files in the classes")
    return f"the data have changed since the run began: {', '.join(changes)}" if changes else None

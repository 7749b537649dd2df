"""`resnet-func attribute`: the training images behind a prediction."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from resnet_func.app import data, inference
from resnet_func.app.answers import attributing, scoring
from resnet_func.app.answers.attributing import Network, Ranked
from resnet_func.app.batches import Preparer
from resnet_func.app.commands.common import configure, plain_console, read_images, say
from resnet_func.app.errors import Unspoken, UsageError, warn
from resnet_func.app.names import counted, printable
from resnet_func.app.options import Attribute
from resnet_func.app.output.attributions import Shown, attribution
from resnet_func.app.ranks import launch
from resnet_func.app.storage import run_folder
from resnet_func.app.tasks import check_classes
from resnet_func.app.training_set import image_name, load_training


def main(options: Attribute) -> None:
    """Print a table, and draw a picture, of the most helpful and the most harmful training images.

    Under torchrun every rank computes its part of what is kept of the training images.

    Raises:
        Unspoken: some files could not be read, which is said, and the other images are done.
    """
    failures: list[data.DataError] = []
    with launch.group(options.machine.device, timeout=options.machine.rank_timeout) as group:
        _attribute(options, group, failures)
    if failures:
        raise Unspoken(failures[0])


def _attribute(options: Attribute, group: launch.Group, failures: list[data.DataError]) -> None:
    output, folder = plain_console(quiet=group.rank > 0), options.run_dir or run_folder.latest()
    machine = scoring.exact(configure(options.machine))
    experiment, task = run_folder.read_config(folder)
    if options.data_dir is not None:
        experiment = replace(experiment, data_dir=str(options.data_dir))
    training, test = group.first_on_node(lambda: load_training(experiment))
    check_classes(task, training.source)
    network, warnings = attributing.open_network(folder, training, machine, options.batch_size, group)
    for warning in [] if group.rank else warnings:
        warn(warning)
    found = read_images(options.images, network.trained, failures, quiet=group.rank > 0)
    names, images = _images(list(found), options, test)
    if not images:
        return
    prepare = Preparer(task, machine)
    x = torch.cat([prepare(image[None]) for image in images])
    probabilities = inference.predict(network.trained, images, machine).softmax(1)
    y = _targets(options, network, probabilities)
    with _progress(output) as progress:
        began = time.perf_counter()
        scores = attributing.scores(network, options.method, x, y.to(x.device), options.dim, progress)
        seconds = time.perf_counter() - began
    if scores is None:
        return
    if launch.is_restarted():
        run_folder.remove_leftovers(folder)
    say(output, f"{options.method} over {counted(len(scores), 'training image')} in {seconds:.1f} s")
    stems = _distinct([Path(name).stem.replace(" ", "-") for name in names])
    for place, (name, image) in enumerate(zip(names, images, strict=True)):
        target = int(y[place])
        says = f"{task.classes[target]} ({float(probabilities[place, target]):.1%})"
        ranked = attributing.rank(scores[:, place], options.shown)
        _tell(output, network, ranked, f"{name}: {says}")
        path = folder / f"attribute-{stems[place]}-{options.method}.png"
        _draw(network, ranked, image, says, path, f"{experiment.recipe.model} on {experiment.dataset}")
        say(output, f"wrote {path}")


def _distinct(stems: list[str]) -> list[str]:
    """The names, with a number where one came before: files in several folders may have the same."""
    names: list[str] = []
    for stem in stems:
        numbered = (f"{stem}-{count}" for count in itertools.count(2))
        names.append(next(name for name in itertools.chain([stem], numbered) if name not in names))
    return names


def _images(
    files: list[tuple[Path, Tensor]], options: Attribute, test: data.Source
) -> tuple[list[str], list[Tensor]]:
    """Names and stored images, files first.

    Raises:
        UsageError: there is no such test image.
    """
    wrong = [index for index in options.test_index if index >= test.num_samples]
    if wrong:
        raise UsageError(f"--test-index must be 0 to {test.num_samples - 1}; got {wrong[0]}")
    index = torch.tensor(options.test_index, dtype=torch.int64, device="cpu")
    shown = [images[0].cpu() for images, _ in test.read(index.split(1))] if len(index) else []
    names = [*[str(path) for path, _ in files], *[f"test {index}" for index in options.test_index]]
    return names, [*[image for _, image in files], *shown]


def _targets(options: Attribute, network: Network, probabilities: Tensor) -> Tensor:
    classes = network.trained.task.classes
    if options.label and options.label not in classes:
        raise UsageError(f"--label must be one of {', '.join(classes[:20])}; got {options.label!r}")
    if options.label:
        return torch.full(
            (len(probabilities),), classes.index(options.label), dtype=torch.int64, device="cpu"
        )
    return probabilities.argmax(1)


def _described(network: Network, place: int) -> tuple[str, str]:
    """A training image's label and name."""
    source, training = network.training.source, network.training
    label = source.classes[int(source.labels[place])]
    return label, image_name(source, place, int(training.places[place]))


def _tell(output: Console, network: Network, ranked: Ranked, title: str) -> None:
    """A table, the strongest first; scores as shares of the strongest of all."""
    say(output, title)
    table = Table("", "score", "label", "training image", box=None)
    strongest = float(ranked.scores.abs().max()) or 1.0
    for word, places in (("helped", ranked.helpful), ("harmed", ranked.harmful)):
        for place in places.tolist():
            label, name = _described(network, place)
            share = f"{100 * float(ranked.scores[place]) / strongest:+.0f} %"
            table.add_row(word, share, Text(printable(label)), Text(printable(name), overflow="fold"))
    output.print(table)


def _draw(network: Network, ranked: Ranked, image: Tensor, says: str, path: Path, title: str) -> None:
    strongest = float(ranked.scores.abs().max()) or 1.0
    shown = []
    for places in (ranked.helpful, ranked.harmful):
        pictures = attributing.images_at(network.training, places)
        shown.append(
            [
                Shown(picture, label, float(ranked.scores[place]) / strongest, name)
                for place, picture in zip(places.tolist(), pictures, strict=True)
                for label, name in [_described(network, place)]
            ]
        )
    method = path.stem.rpartition("-")[2]
    title = f"{title}: the training images behind a prediction, by {method}"
    attribution(image, says, shown[0], shown[1], path, title)


@contextmanager
def _progress(output: Console) -> Iterator[attributing.Progress]:
    """A progress bar on a terminal, and nothing elsewhere."""
    with Progress(console=output, disable=not output.is_terminal, transient=True) as bar:

        def begin(what: str, rows: int) -> Callable[[int], object]:
            task = bar.add_task(what, total=rows)
            return lambda done: bar.update(task, advance=done)

        yield begin

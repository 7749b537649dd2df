"""`resnet-func predict`: name what is on images."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from resnet_func.app import data, inference
from resnet_func.app.commands.common import configure, load, plain_console, read_images, say
from resnet_func.app.errors import Unspoken
from resnet_func.app.names import printable
from resnet_func.app.options import Predict
from resnet_func.app.storage import run_folder


def main(options: Predict) -> None:
    """Print the five likeliest classes of each image; of a file that cannot be read, a line on stderr.

    Raises:
        Unspoken: some could not be read, and the others are done.
    """
    output, folder = plain_console(), options.run_dir or run_folder.latest()
    machine = configure(options.machine, folder)
    trained = load(folder, options.checkpoint, machine, flips=None)
    failures: list[data.DataError] = []
    found = read_images(options.images, trained, failures)
    while batch := list(islice(found, trained.experiment.recipe.evaluation_batch)):
        logits = inference.predict(trained, (image for _, image in batch), machine)
        for (path, _), of_image in zip(batch, logits, strict=True):
            _tell(output, path, of_image, trained.task.classes)
    if failures:
        raise Unspoken(failures[0])


def _tell(output: Console, path: Path, logits: Tensor, classes: tuple[str, ...]) -> None:
    best = logits.softmax(0).topk(min(5, len(logits)))
    say(output, str(path))
    table = Table(Column("class", overflow="fold"), "probability", box=None)
    for share, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        table.add_row(printable(classes[index]), f"{share:.1%}")
    output.print(table)

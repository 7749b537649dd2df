"""`resnet-func predict`: name what is on images."""

from __future__ import annotations

from rich.table import Column, Table

from resnet_func.app import inference
from resnet_func.app.commands.common import configure, load, plain_console, say
from resnet_func.app.names import printable
from resnet_func.app.options import Predict
from resnet_func.app.storage import run_folder


def main(options: Predict) -> None:
    """Print the five likeliest classes of each image."""
    output, folder = plain_console(), options.run_dir or run_folder.latest()
    machine = configure(options.machine, folder)
    trained = load(folder, options.checkpoint, machine, flips=None)
    images = (inference.read_image(path, trained) for path in options.images)
    for path, logits in zip(options.images, inference.predict(trained, images, machine), strict=True):
        best = logits.softmax(0).topk(min(5, len(logits)))
        say(output, str(path))
        table = Table(Column("class", overflow="fold"), "probability", box=None)
        for share, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            table.add_row(printable(trained.task.classes[index]), f"{share:.1%}")
        output.print(table)

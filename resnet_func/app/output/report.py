"""What a trained network's evaluation amounts to: accuracy, a table by class, and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from resnet_func.app import data
from resnet_func.app.names import printable
from resnet_func.app.output import plots
from resnet_func.train import Evaluation

MISTAKES_SHOWN = 25


def class_table(evaluation: Evaluation, classes: tuple[str, ...]) -> Table:
    """Precision, recall (the class's accuracy) and F1 of each class, with its number of images.

    Args:
        evaluation: logits [N, C] and targets [N], N at least 1.
        classes: names of the C classes, any text at all.

    Returns:
        A row per class, in the order of `classes`. A class without images, or that is never predicted, has
        zeros where its ratio is 0 / 0.

    >>> results = Evaluation(torch.zeros(2), torch.eye(2), torch.tensor([0, 1]))
    >>> [list(column.cells)[0] for column in class_table(results, ("accuracy", "dog")).columns][1:]
    ['100.00%', '100.00%', '100.00%', '1']
    """
    # the stubs do not tell arrays from the averages that other options give
    scores: Any = precision_recall_fscore_support(
        evaluation.targets.numpy(),
        evaluation.logits.argmax(1).numpy(),
        labels=np.arange(len(classes)),
        zero_division=0,  # pyright: ignore[reportArgumentType]  (the stubs know only text)
    )
    table = Table("class", box=None)
    for name in ("precision", "recall", "F1", "images"):
        table.add_column(name, justify="right")
    for name, precision, recall, f1, images in zip(classes, *scores, strict=True):
        # as Text: a name in brackets is no markup
        table.add_row(
            Text(printable(name)), f"{precision:.2%}", f"{recall:.2%}", f"{f1:.2%}", f"{images:.0f}"
        )
    return table


def write_pictures(
    evaluation: Evaluation, source: data.Source, classes: tuple[str, ...], folder: Path, title: str
) -> None:
    """Write confusion.png and mistakes.png (the most confident mistakes) into `folder`."""
    predictions = evaluation.logits.argmax(1)
    matrix = confusion_matrix(evaluation.targets, predictions, labels=range(len(classes)))
    plots.confusion(torch.from_numpy(matrix), classes, folder / "confusion.png", title)
    confidence = evaluation.logits.softmax(1).amax(1)
    wrong = (predictions != evaluation.targets).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES_SHOWN]
    images = [images for images, _ in source.read(worst.split(1))]
    none = torch.empty((0, *source.image_shape), dtype=torch.uint8, device="cpu")
    plots.mistakes(
        torch.cat(images).cpu() if images else none,
        evaluation.targets[worst],
        predictions[worst],
        confidence[worst],
        classes,
        folder / "mistakes.png",
        title,
    )
